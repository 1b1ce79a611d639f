"""The six classes of the stand-ins."""

from wsiseg.classes import Classes, TissueClass

CLASSES = Classes(
    tuple(TissueClass(f"class {k}", (40 * k, 200 - 30 * k, 90), k == 0) for k in range(6))
)
