"""Outputs are cumulative, and an earlier one does not change when tokens are added."""

from __future__ import annotations

from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.request import Tokens


def test_tokens_are_those_that_were_there_when_they_were_taken() -> None:
    source = [5, 6, 7, 8]
    tokens = Tokens(source, 1)
    source.append(9)
    assert (len(tokens), list(tokens), repr(tokens)) == (3, [6, 7, 8], "(6, 7, 8)")
    assert (tokens[0], tokens[-1], tokens[1:], tokens[::-1]) == (6, 8, (7, 8), (8, 7, 6))
    assert tokens == (6, 7, 8) == tokens
    assert tokens == Tokens([6, 7, 8], 0)
    assert tokens != [6, 7, 8], "a tuple does not equal a list either"
    assert {tokens} == {(6, 7, 8)}
    assert (7 in tokens, 9 in tokens) == (True, False)


def test_each_output_has_all_tokens_up_to_its_own_and_keeps_them() -> None:
    engine = Engine.from_pretrained("demo-draft", device="cpu")
    engine.add_request([20, 21, 22], SamplingParams(max_tokens=6, ignore_eos=True))
    outputs = [output for _ in range(6) for output in engine.step()]
    engine.close()
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3, 4, 5, 6]
    assert all(output.token_ids == outputs[-1].token_ids[: len(output.token_ids)] for output in outputs)
