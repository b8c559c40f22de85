"""placeholder"""


def quantize() -> None:
    """placeholder"""
