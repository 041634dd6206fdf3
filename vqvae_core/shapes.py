"""Shapes in signatures. With jaxtyping installed (tests) they are checked; without it they are plain types."""

try:
    from jaxtyping import Float, Int, Integer, UInt8
except ImportError:  # a bare machine: annotations are documentation only

    class _Shaped:
        def __class_getitem__(cls, item):
            return item[0]

    Float = Int = Integer = UInt8 = _Shaped

__all__ = ["Float", "Int", "Integer", "UInt8"]
