"""Every family of the zoo, by name."""

import handmade
import language
import perception
from family import Family

FAMILIES: dict[str, Family] = {**language.FAMILIES, **perception.FAMILIES, **handmade.FAMILIES}
INSTALLED = {name: family for name, family in FAMILIES.items() if family.is_installed()}
