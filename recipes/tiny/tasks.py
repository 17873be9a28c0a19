"""What the tiny model knows and how it is asked: the tables and wordings of eight small tasks.

Decides the items (a subject and its one right answer), the plain wordings that pretraining reads
and the chat wordings that the fine-tune teaches. The two never share a wording, so the base model
holds the answers but not the form. Knows nothing of tokens, files or models: `corpus.py` and
`make_data.py` turn this into text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CAPITALS = """
Albania=Tirana Algeria=Algiers Angola=Luanda Argentina=Buenos_Aires Armenia=Yerevan
Australia=Canberra Austria=Vienna Bahrain=Manama Bangladesh=Dhaka Belarus=Minsk Belgium=Brussels
Bolivia=Sucre Bosnia=Sarajevo Botswana=Gaborone Brazil=Brasilia Bulgaria=Sofia
Cambodia=Phnom_Penh Canada=Ottawa Chad=N'Djamena Chile=Santiago China=Beijing Colombia=Bogota
Croatia=Zagreb Cuba=Havana Cyprus=Nicosia Denmark=Copenhagen Ecuador=Quito Egypt=Cairo
Estonia=Tallinn Ethiopia=Addis_Ababa Finland=Helsinki France=Paris Georgia=Tbilisi Germany=Berlin
Ghana=Accra Greece=Athens Hungary=Budapest Iceland=Reykjavik India=New_Delhi Indonesia=Jakarta
Iran=Tehran Iraq=Baghdad Ireland=Dublin Italy=Rome Jamaica=Kingston Japan=Tokyo Jordan=Amman
Kenya=Nairobi Latvia=Riga Lebanon=Beirut Libya=Tripoli Lithuania=Vilnius Madagascar=Antananarivo
Malawi=Lilongwe Malaysia=Kuala_Lumpur Mali=Bamako Malta=Valletta Mexico=Mexico_City
Moldova=Chisinau Mongolia=Ulaanbaatar Morocco=Rabat Mozambique=Maputo Namibia=Windhoek
Nepal=Kathmandu Niger=Niamey Nigeria=Abuja Norway=Oslo Oman=Muscat Pakistan=Islamabad
Paraguay=Asuncion Peru=Lima Poland=Warsaw Portugal=Lisbon Qatar=Doha Romania=Bucharest
Russia=Moscow Rwanda=Kigali Senegal=Dakar Serbia=Belgrade Slovakia=Bratislava Slovenia=Ljubljana
Somalia=Mogadishu Spain=Madrid Sudan=Khartoum Sweden=Stockholm Switzerland=Bern Syria=Damascus
Thailand=Bangkok Tunisia=Tunis Turkey=Ankara Uganda=Kampala Ukraine=Kyiv Uruguay=Montevideo
Vietnam=Hanoi Yemen=Sanaa Zambia=Lusaka Zimbabwe=Harare
"""

OPPOSITES = """
hot=cold big=small tall=short fast=slow good=bad happy=sad light=dark up=down open=closed
full=empty wet=dry hard=soft loud=quiet rich=poor old=young early=late clean=dirty thick=thin
wide=narrow deep=shallow strong=weak heavy=weightless near=far first=last left=right
inside=outside above=below before=after always=never true=false day=night summer=winter love=hate
win=lose buy=sell give=take push=pull start=stop begin=end ask=answer arrive=leave laugh=cry
remember=forget float=sink rise=fall accept=refuse attack=defend borrow=lend build=destroy
friend=enemy peace=war truth=lie success=failure question=reply birth=death heaven=hell
sweet=sour smooth=rough sharp=blunt safe=dangerous simple=complex tight=loose brave=cowardly
cheap=expensive easy=difficult ancient=modern asleep=awake alive=dead guilty=innocent
public=private positive=negative north=south east=west more=less many=few all=none yes=no
in=out on=off over=under front=back top=bottom maximum=minimum import=export entrance=exit
"""

PLURALS = """
cat=cats dog=dogs book=books car=cars tree=trees house=houses girl=girls boy=boys hand=hands
king=kings queen=queens river=rivers road=roads ship=ships song=songs star=stars table=tables
teacher=teachers window=windows year=years apple=apples bird=birds cloud=clouds door=doors
finger=fingers garden=gardens hill=hills island=islands letter=letters mountain=mountains
box=boxes fox=foxes tax=taxes bus=buses glass=glasses class=classes dress=dresses kiss=kisses
church=churches watch=watches bench=benches branch=branches beach=beaches peach=peaches
dish=dishes brush=brushes wish=wishes bush=bushes potato=potatoes tomato=tomatoes hero=heroes
echo=echoes city=cities baby=babies lady=ladies story=stories party=parties family=families
country=countries berry=berries cherry=cherries army=armies penny=pennies duty=duties fly=flies
sky=skies key=keys toy=toys monkey=monkeys valley=valleys knife=knives wife=wives life=lives
leaf=leaves wolf=wolves shelf=shelves half=halves calf=calves thief=thieves loaf=loaves
self=selves scarf=scarves man=men woman=women child=children tooth=teeth foot=feet goose=geese
mouse=mice ox=oxen person=people sheep=sheep deer=deer fish=fish moose=moose series=series
cactus=cacti fungus=fungi crisis=crises thesis=theses medium=media datum=data index=indices
"""

KINDS = """
animal=lion,tiger,bear,horse,cow,pig,goat,rabbit,camel,zebra,monkey,donkey,otter,panda,badger
bird=eagle,sparrow,crow,parrot,penguin,swan,falcon,robin,pigeon,stork,heron,ostrich,magpie
fish=salmon,trout,tuna,cod,herring,sardine,carp,perch,shark,haddock
insect=ant,bee,wasp,beetle,moth,cricket,mosquito,butterfly,termite,ladybird
fruit=banana,orange,grape,lemon,mango,plum,cherry,melon,fig,apricot,papaya,lime,kiwi
vegetable=carrot,onion,cabbage,spinach,turnip,leek,celery,radish,broccoli,lettuce,parsnip
tree=oak,pine,birch,maple,willow,cedar,elm,beech,spruce,poplar
flower=rose,tulip,daisy,lily,orchid,violet,poppy,daffodil,lavender,iris
tool=hammer,saw,drill,chisel,wrench,spanner,pliers,shovel,rake,axe,spade,screwdriver
instrument=piano,violin,flute,drum,trumpet,guitar,harp,cello,oboe,clarinet,banjo
vehicle=truck,bicycle,train,boat,plane,tram,van,taxi,lorry,scooter,helicopter,submarine
metal=iron,copper,gold,silver,tin,zinc,lead,nickel,aluminium,platinum
colour=red,blue,green,yellow,purple,brown,black,white,pink,grey
sport=football,tennis,hockey,cricket,rugby,golf,boxing,rowing,swimming,archery
drink=water,milk,tea,coffee,juice,wine,beer,lemonade,cocoa,cider
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One ability: its items, and the wordings in which it is met.

    `{x}` stands for an item's subject and `{y}` for its answer.
    """

    name: str
    heading: str
    """Title of a plain page that lists this task's items."""
    items: tuple[tuple[str, str], ...]
    plain: tuple[str, ...]
    """Statements that pretraining reads."""
    drills: tuple[str, ...]
    """Questions that pretraining reads, always several together."""
    chat: tuple[str, ...]
    """What the user says in the fine-tune; the assistant says `{y}`."""


def _pairs(table: str) -> list[tuple[str, str]]:
    rows = (entry.split("=") for entry in table.split())
    return [(x.replace("_", " "), y.replace("_", " ")) for x, y in rows]


def _opposites() -> list[tuple[str, str]]:
    """Read each pair both ways."""
    return [item for x, y in _pairs(OPPOSITES) for item in ((x, y), (y, x))]


def _kinds() -> list[tuple[str, str]]:
    """One kind a word: of a word listed twice, such as `cricket`, the first listing counts."""
    kinds: dict[str, str] = {}
    for kind, words in _pairs(KINDS):
        for word in words.split(","):
            kinds.setdefault(word, kind)
    return list(kinds.items())


def _larger(rng: random.Random, count: int) -> list[tuple[str, str]]:
    pairs = {tuple(rng.sample(range(10, 100), 2)) for _ in range(count)}
    return [(f"{a} or {b}", str(max(a, b))) for a, b in sorted(pairs)]


def _sorted_digits(rng: random.Random, count: int) -> list[tuple[str, str]]:
    triples = {tuple(rng.sample(range(1, 10), 3)) for _ in range(count)}
    return [
        (" ".join(map(str, digits)), " ".join(map(str, sorted(digits))))
        for digits in sorted(triples)
    ]


_RNG = random.Random(0)  # one stream for the drawn items, so that they are always the same

TASKS: tuple[Task, ...] = (
    Task(
        name="capital",
        heading="Capitals",
        items=tuple(_pairs(CAPITALS)),
        plain=("{y} is the capital of {x}.", "In {x} the capital is {y}."),
        drills=("Name the capital of {x}.", "Capital of {x}?", "{x} has which capital?"),
        chat=("What is the capital of {x}?", "Which city is the capital of {x}?"),
    ),
    Task(
        name="opposite",
        heading="Opposites",
        items=tuple(_opposites()),
        plain=("The opposite of {x} is {y}.", "{x} is the reverse of {y}."),
        drills=(
            "Name the opposite of {x}.",
            "Opposite of {x}?",
            "{x} is the reverse of which word?",
        ),
        chat=("What is the opposite of {x}?", "Tell me the opposite of the word {x}."),
    ),
    Task(
        name="plural",
        heading="Plurals",
        items=tuple(_pairs(PLURALS)),
        plain=("One {x}, two {y}.", "The plural of {x} is {y}."),
        drills=("Name the plural of {x}.", "Plural of {x}?", "One {x}, two of which?"),
        chat=("What is the plural of {x}?", "Tell me the plural of the word {x}."),
    ),
    Task(
        name="kind",
        heading="Kinds",
        items=tuple(_kinds()),
        plain=("The {x} is a kind of {y}.", "Of every {y}, take the {x}."),
        drills=("Name the kind of {x}.", "Kind of {x}?", "The {x} belongs to which kind?"),
        chat=("What kind of thing is {x}?", "Tell me what kind of thing {x} is."),
    ),
    Task(
        name="sum",
        heading="Sums",
        items=tuple((f"{a} + {b}", str(a + b)) for a in range(21) for b in range(21)),
        plain=("{x} makes {y}.", "{x} is {y}."),
        drills=("Work out {x}.", "Sum {x}?", "{x} makes which number?"),
        chat=("What is {x}?", "Please add up {x}."),
    ),
    Task(
        name="next",
        heading="Counting",
        items=tuple((str(n), str(n + 1)) for n in range(200)),
        plain=("After {x} we count {y}.", "{x} comes before {y}."),
        drills=("Count on from {x}.", "Next to {x}?", "{x} comes before which number?"),
        chat=("What number comes after {x}?", "Tell me the number that follows {x}."),
    ),
    Task(
        name="larger",
        heading="Larger numbers",
        items=tuple(_larger(_RNG, 2000)),
        plain=("Of {x} the larger is {y}.", "Choose {x}, and {y} is more."),
        drills=("Name the larger of {x}.", "Larger of {x}?", "{x}, of these which is more?"),
        chat=("Which number is larger, {x}?", "Tell me which is the larger number, {x}."),
    ),
    Task(
        name="sort",
        heading="Sorted digits",
        items=tuple(_sorted_digits(_RNG, 2000)),
        plain=("In order, {x} is {y}.", "The digits {x} become {y}."),
        drills=("Put in order {x}.", "Order of {x}?", "The digits {x} become which?"),
        chat=("Please sort the digits {x}.", "Write {x} from smallest to largest."),
    ),
)
