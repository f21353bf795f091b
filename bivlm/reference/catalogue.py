"""An invented catalogue of creatures: three facts each, which the model can only have memorized."""

import random
from dataclasses import dataclass
from functools import cache

CREATURES = 1500
_SEED = 20260

ATTRIBUTES = ("home", "food", "trade")
VALUES = {
    "home": (
        "kelt", "ostra", "brund", "fenwick", "galdor", "hesper", "irongate", "jarrow", "lumen", "morava", "nivara",
        "orlen", "pellin", "quarn", "rivendal", "saltmere", "tarsk", "umbria", "varda", "westholm", "yarrow",
        "zephyr", "amberley", "bristow", "corvale", "dunmore", "eldham", "farrow", "glenn", "harrow", "islay", "kirkby",
    ),
    "food": (
        "plums", "figs", "oats", "rye", "clover", "moss", "honey", "nuts", "berries", "seeds", "grass", "roots",
        "leaves", "fish", "shrimp", "snails", "worms", "beetles", "ants", "crabs", "mushrooms", "apples", "pears",
        "cherries", "corn", "rice", "beans", "kelp", "bark", "petals", "eggs", "cheese",
    ),
    "trade": (
        "baker", "weaver", "smith", "potter", "sailor", "miner", "tailor", "mason", "carver", "piper", "singer",
        "dancer", "painter", "scribe", "healer", "hunter", "fisher", "farmer", "miller", "brewer", "tanner", "cooper",
        "glazier", "joiner", "dyer", "saddler", "printer", "gilder", "tinker", "porter", "herald", "guard",
    ),
}  # fmt: skip

_FIRST = ("bal", "cor", "dra", "fen", "gri", "hul", "jas", "kel", "lom", "mir", "nor", "pel", "qua", "ros", "sul",
          "tam", "ulm", "vel", "wen", "xar", "yor", "zim", "bru", "cas", "dol", "fli", "gam", "hes", "kro", "lin",
          "mun", "nex", "pra", "rud", "sko", "tri", "vor", "wil", "zan", "ost")  # fmt: skip
_LAST = ("adan", "ebur", "ichor", "olun", "umar", "apix", "erro", "inka", "omba", "usk", "avel", "endi", "ilo", "orat",
         "utti", "amon", "estra", "ivor", "ozen", "ulca", "arno", "ephy", "igan", "oxa", "undra", "acho", "ello",
         "ispa", "ondo", "urma", "atti", "efro", "ilva", "okka", "unzi", "abri", "etla", "izmo", "orba",
         "uval")  # fmt: skip


@dataclass(frozen=True)
class Creature:
    """A name and its value for each attribute."""

    name: str
    home: str
    food: str
    trade: str

    def __getitem__(self, attribute: str) -> str:
        if attribute not in ATTRIBUTES:
            raise KeyError(f"attribute is {attribute!r}, valid are {', '.join(ATTRIBUTES)}")
        return getattr(self, attribute)


@cache
def creatures() -> tuple[Creature, ...]:
    """Return all creatures, always the same: names are distinct, and values of an attribute equally frequent."""
    rng = random.Random(_SEED)
    names = rng.sample([first + last for first in _FIRST for last in _LAST], CREATURES)
    columns = []
    for attribute in ATTRIBUTES:
        values = VALUES[attribute]
        column = [values[index % len(values)] for index in range(CREATURES)]
        rng.shuffle(column)
        columns.append(column)
    return tuple(Creature(*facts) for facts in zip(names, *columns, strict=True))
