"""The words of the synthetic product prose: categories, each with phrases that suit it.

All of it was written for this project; it describes no real product. Phrases fit fixed places in a sentence:

materials  uncountable, after "made of"          details  "a thing > what it does" (verb in base form)
deeds      what the product does (base form)     places   with their preposition
users      plural                                occasions  after "I use it"
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """One kind of product; `name` as a catalogue prints it, `short` as people call it once it is known."""

    name: str
    short: str
    materials: tuple[str, ...]
    adjectives: tuple[str, ...]
    details: tuple[tuple[str, str], ...]
    deeds: tuple[str, ...]
    places: tuple[str, ...]
    users: tuple[str, ...]
    occasions: tuple[str, ...]
    weight_grams: tuple[int, int]

    @property
    def lower(self) -> str:
        """The name as it stands inside a sentence."""
        return self.name.lower()


# Fit every category; a product draws from its own adjectives, from these and from LOOKS.
COMMON_ADJECTIVES = ("practical", "durable", "reliable", "versatile", "unobtrusive")
# What a form, a silhouette, a design or an appearance can be.
LOOKS = (
    "elegant",
    "modern",
    "timeless",
    "understated",
    "refined",
    "distinctive",
    "harmonious",
    "restrained",
    "graceful",
    "confident",
    "minimalist",
    "expressive",
)
COLOURS = (
    "black",
    "white",
    "graphite",
    "sand",
    "olive",
    "dark blue",
    "light grey",
    "terracotta",
    "moss green",
    "pearl white",
    "anthracite",
    "copper red",
    "cream",
    "petrol",
    "mustard yellow",
    "slate grey",
)


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(";"))


def _details(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (phrase.split(">") for phrase in _phrases(text))
    return tuple((thing.strip(), effect.strip()) for thing, effect in pairs)


def _category(name: str, short: str, weight_grams: tuple[int, int], **words: str) -> Category:
    """Lists are written as one string each, parted by semicolons, to keep a category on one screen."""
    details = _details(words.pop("details"))
    return Category(
        name,
        short,
        details=details,
        weight_grams=weight_grams,
        **{field: _phrases(text) for field, text in words.items()},
    )


CATEGORIES = (
    _category(
        "Table Lamp",
        "lamp",
        (900, 3200),
        materials="brushed aluminium; powder-coated steel; blown glass; oiled oak; folded paper; matt ceramic",
        adjectives="slender; warm; poetic; compact; graceful; sculptural",
        details="a weighted base > keep it steady on any surface; a stepless dimmer > adjust the light by touch; "
        "a fabric cable > lie flat behind the furniture; a swivelling shade > direct the beam with one finger; "
        "a hidden switch > leave the surface undisturbed; a frosted diffuser > prevent glare; "
        "a magnetic joint > hold every position; a replaceable LED > last for many years",
        deeds="cast a warm and even light; light a page without glare; fill the room with a soft glow; "
        "dim without a flicker; give the evening a gentle mood; need very little power",
        places="on a desk; beside the bed; in a reading corner; on a sideboard; in a hotel room",
        users="late readers; students; architects; hotel guests; people who work at night",
        occasions="when I read in bed; every evening; while the children are asleep; when I write letters",
    ),
    _category(
        "Office Chair",
        "chair",
        (9000, 18000),
        materials="recycled nylon; die-cast aluminium; moulded plywood; knitted mesh; tubular steel; wool felt",
        adjectives="ergonomic; supportive; slim; agile; comfortable; lightweight",
        details="a breathable back > keep the sitter cool; a synchronous mechanism > follow each movement; "
        "an adjustable lumbar support > relieve the spine; a waterfall seat edge > ease pressure on the legs; "
        "a five-star base > give it a secure footing; a padded armrest > support the elbow; "
        "a single lever > set the height and the tilt; a flexible frame > yield when the sitter leans back",
        deeds="adapt to the body of the sitter; encourage an upright posture; roll quietly over hard floors; "
        "stay comfortable during long meetings; support the back all day; need no tools for assembly",
        places="in an open office; at a home desk; in a meeting room; in a design studio; behind a reception desk",
        users="office workers; programmers; people with back pain; small studios; editors",
        occasions="when I work from home; eight hours a day; during long calls; when I write reports",
    ),
    _category(
        "Espresso Machine",
        "machine",
        (5500, 14000),
        materials="polished stainless steel; enamelled steel; cast aluminium; chromed brass; recycled plastic",
        adjectives="compact; professional; precise; robust; gleaming; quiet",
        details="a brass boiler > keep the temperature constant; a pressure gauge > show the state of the brew; "
        "a steam wand > froth milk to a fine foam; a walnut handle > stay cool in the hand; "
        "a removable tank > make refilling easy; a heated cup tray > warm the cups in advance; "
        "a single dial > control every step; a quiet pump > let the kitchen wake up slowly",
        deeds="brew a rich espresso in half a minute; heat up in less than two minutes; fit under a low cupboard; "
        "rinse itself after each use; bring the quality of a cafe into the home; serve two cups at once",
        places="on a kitchen counter; in a small cafe; in the office kitchen; in a hotel lobby; on a narrow shelf",
        users="coffee lovers; small cafes; early risers; office teams; home baristas",
        occasions="every morning; after lunch; when guests come; before I leave for work",
    ),
    _category(
        "Cycling Helmet",
        "helmet",
        (210, 420),
        materials="expanded foam and polycarbonate; recycled foam; carbon fibre; moulded cork; sturdy plastic",
        adjectives="lightweight; aerodynamic; protective; airy; sporty; safe",
        details="a magnetic buckle > close with one hand; a rear light > make the rider visible at night; "
        "a turning dial > fit the shell to the head; a washable lining > absorb sweat; "
        "a short visor > shield the eyes from rain; a reflective strap > shine in the beam of headlights; "
        "a row of wide vents > let the air flow; a slip layer > reduce the force of a fall",
        deeds="protect the head from every side; sit firmly without pressure; keep a cool head on steep climbs; "
        "weigh hardly more than a cap; fit over a thin hat; cut through the wind",
        places="in city traffic; on mountain roads; on the way to work; on a gravel track; in the rain",
        users="commuters; racing cyclists; couriers; parents with cargo bikes; touring cyclists",
        occasions="on my way to work; on every ride; when I ride at night; on long tours",
    ),
    _category(
        "Wristwatch",
        "watch",
        (35, 140),
        materials="brushed titanium; stainless steel; black ceramic; bronze; rose gold; recycled steel",
        adjectives="slim; precise; classic; restrained; legible; sporty",
        details="a domed sapphire crystal > resist scratches; a leather strap > adapt to the wrist; "
        "an automatic movement > run without a battery; a matt dial > make the time easy to read; "
        "a luminous hand > glow in the dark; a screwed crown > keep water out; "
        "a date window > sit discreetly at six o'clock; a glass back > reveal the movement",
        deeds="show the time at a glance; lie flat under the cuff; keep time to the second; "
        "accompany its owner for decades; withstand water and dust; dispense with every ornament",
        places="on the wrist; under a shirt cuff; at the office; on a boat; at a formal dinner",
        users="collectors; travellers; people who love mechanics; divers; lovers of plain form",
        occasions="every day; when I travel; at meetings; on weekends at the lake",
    ),
    _category(
        "Kettle",
        "kettle",
        (700, 1600),
        materials="brushed stainless steel; enamelled steel; heat-resistant glass; copper; double-walled steel",
        adjectives="compact; quick; sturdy; friendly; gleaming; quiet",
        details="a curved spout > pour without dripping; a cork handle > stay cool; "
        "a wide lid > make cleaning simple; a clear scale > show the level of the water; "
        "a soft whistle > announce the boil; an automatic switch > turn the heat off in time; "
        "a round base > turn freely in every direction; a fine filter > hold back lime",
        deeds="boil a litre of water in three minutes; pour in a calm and steady stream; keep water hot for an hour; "
        "rest safely on its base; make no more noise than needed; save power with every cup",
        places="on the stove; on a kitchen counter; in a small kitchen; at the breakfast table; in the office kitchen",
        users="tea drinkers; families; students; early risers; patient cooks",
        occasions="every morning; for my afternoon tea; when friends drop in; before breakfast",
    ),
    _category(
        "Backpack",
        "backpack",
        (600, 1700),
        materials="recycled polyester; waxed canvas; ripstop nylon; vegetable-tanned leather; coated cotton",
        adjectives="roomy; lightweight; urban; rugged; water-repellent; versatile",
        details="a padded sleeve > protect a laptop; a roll-top closure > adapt the volume; "
        "a hidden pocket > keep the passport safe; a ventilated back > let the air circulate; "
        "a chest strap > steady the load; a two-way zip > open the bag completely; "
        "a reflective loop > improve visibility at night; a folding divider > keep clothes and papers apart",
        deeds="carry a day's luggage with ease; spread its weight over both shoulders; fit under an aeroplane seat; "
        "keep the rain out; stand upright on its own; expand when there is more to carry",
        places="on the train; in the city; at the airport; on a forest trail; on a bicycle",
        users="commuters; students; photographers; weekend travellers; hikers",
        occasions="on my way to the office; on short trips; when I go shopping; on every hike",
    ),
    _category(
        "Writing Desk",
        "desk",
        (18000, 46000),
        materials="solid oak; oiled walnut; birch plywood; linoleum and ash; powder-coated steel; cherry wood",
        adjectives="slender; generous; light-footed; sturdy; compact; quiet",
        details="a shallow drawer > hide pens and paper; a cable channel > keep the tabletop free; "
        "a tapered leg > make it look light; a rounded edge > feel gentle under the wrist; "
        "a folding flap > double the work surface; a leather pad > invite one to write by hand; "
        "a narrow shelf > hold books and a lamp; a dovetail joint > need no screw",
        deeds="create order in a small space; offer room for thought; fit into narrow rooms; "
        "stand firmly on uneven floors; grow more beautiful with age; make room for a screen and a notebook",
        places="by the window; in a home office; in a student room; in a library; in the corner of a bedroom",
        users="writers; students; people who work at home; translators; teachers",
        occasions="when I write letters; every morning; for my homework; when I pay the bills",
    ),
    _category(
        "Bookshelf",
        "shelf",
        (9000, 38000),
        materials="solid ash; birch plywood; bent sheet steel; smoked oak; recycled cardboard; lacquered wood",
        adjectives="modular; airy; sturdy; flexible; slender; orderly",
        details="a sliding bookend > hold single volumes upright; a thin back panel > brace the frame; "
        "a wall bracket > prevent it from tipping; a plug-in joint > need no tools; "
        "a deep lower board > carry heavy art books; a slim side panel > let the light pass; "
        "a levelling foot > balance uneven floors; a staggered board > create a lively rhythm",
        deeds="grow with the collection; divide a room without closing it; carry heavy books without bending; "
        "move house without complaint; turn a bare wall into a library; go together in ten minutes",
        places="in the living room; in a narrow hallway; in a library; above a desk; in a children's room",
        users="collectors of books; families; librarians; students; people who move often",
        occasions="for my cookbooks; in the study; for records and books; in the hallway",
    ),
    _category(
        "Vacuum Cleaner",
        "cleaner",
        (2200, 6200),
        materials="recycled plastic; glass-fibre plastic; anodised aluminium; impact-resistant plastic",
        adjectives="quiet; powerful; agile; lightweight; tidy; manoeuvrable",
        details="a washable filter > trap fine dust; a swivel head > reach under low furniture; "
        "a long battery > last for a whole flat; a soft roller > protect wooden floors; "
        "a clear bin > show when it is full; a wall mount > charge the battery; "
        "a folding tube > spare the back; a front light > reveal hidden dust",
        deeds="clean carpets and wooden floors alike; glide around corners; run almost without noise; "
        "empty without raising dust; pick up pet hair at once; park in the smallest cupboard",
        places="in a small flat; on the stairs; under the sofa; in a house with pets; in the car",
        users="pet owners; families; people with allergies; tidy students; hotel staff",
        occasions="on Saturdays; after dinner; when the cat sheds its fur; twice a week",
    ),
    _category(
        "Loudspeaker",
        "speaker",
        (700, 9500),
        materials="oiled walnut; anodised aluminium; woven fabric and steel; cast concrete; lacquered wood",
        adjectives="compact; sonorous; discreet; powerful; sculptural; wireless",
        details="a silk tweeter > render fine detail; a passive radiator > deepen the bass; "
        "a fabric cover > hide the technology; a turning ring > set the volume; "
        "a built-in battery > play through a whole evening; a leather handle > make it portable; "
        "a rubber foot > absorb vibration; a single button > pair it with a phone",
        deeds="fill a room with balanced sound; reproduce voices with clarity; play for twenty hours; "
        "find its place without cables; stay clear at high volume; bring concerts into the home",
        places="on a bookshelf; in the living room; on the balcony; in the kitchen; beside the record player",
        users="music lovers; families; young listeners; owners of records; party hosts",
        occasions="while I cook; on Sunday mornings; when friends come over; with my old records",
    ),
    _category(
        "Camera",
        "camera",
        (280, 920),
        materials="magnesium alloy; milled aluminium; textured leather and metal; glass-fibre plastic",
        adjectives="compact; precise; discreet; fast; robust; handy",
        details="a bright viewfinder > show the whole scene; a ribbed grip > rest safely in the hand; "
        "a metal dial > set the exposure; a quiet shutter > disturb nobody; "
        "a folding screen > allow low angles; a weather seal > keep out rain and dust; "
        "a fast lens > work in little light; a large sensor > capture fine shades",
        deeds="capture sharp pictures at dusk; start in less than a second; fit into a coat pocket; "
        "respond to the slightest touch; reduce photography to the essential; focus faster than the eye",
        places="in the street; on a journey; at a wedding; in the mountains; in a studio",
        users="street photographers; travellers; reporters; beginners; lovers of film",
        occasions="on every journey; when my children play; in the early light; at family parties",
    ),
    _category(
        "Bicycle",
        "bike",
        (7800, 17500),
        materials="chromium steel; butted aluminium; carbon fibre; titanium; recycled aluminium",
        adjectives="agile; lightweight; sturdy; urban; fast; comfortable",
        details="a belt drive > run clean and silent; a hidden battery > help on steep hills; "
        "a disc brake > stop safely in the rain; a front rack > carry the shopping; "
        "a hub dynamo > power the lights; a wide tyre > smooth the ride; "
        "a leather saddle > adapt to the rider; a folding joint > make it small enough for the train",
        deeds="glide through the city without effort; climb hills with ease; carry a week's shopping; "
        "ride as quietly as a breeze; need hardly any maintenance; feel stable at every speed",
        places="in city traffic; on country roads; on the way to work; along the river; on cobblestones",
        users="commuters; families; touring cyclists; students; messengers",
        occasions="on my way to work; on Sundays; when I go to the market; all year round",
    ),
    _category(
        "Tent",
        "tent",
        (1400, 7200),
        materials="ripstop nylon; recycled polyester; coated cotton; silicone-coated nylon",
        adjectives="lightweight; weatherproof; roomy; stable; airy; quick",
        details="a curved pole > withstand strong wind; a wide porch > keep boots and packs dry; "
        "a fine mesh > keep insects out; a sewn floor > stop the damp; "
        "a colour-coded clip > speed up pitching; a roof vent > reduce condensation; "
        "a reflective guy line > prevent stumbling at night; a second door > give each sleeper an exit",
        deeds="go up in five minutes; pack down to the size of a loaf; stand firm in a storm; "
        "stay dry through a night of rain; sleep three people in comfort; let in the morning light",
        places="in the mountains; on a campsite by the sea; in the forest; at a festival; on a windy ridge",
        users="hikers; families; mountaineers; cyclists on tour; festival guests",
        occasions="in the summer holidays; on long hikes; when we go to the sea; with my daughter",
    ),
    _category(
        "Fountain Pen",
        "pen",
        (16, 48),
        materials="turned brass; black resin; brushed steel; anodised aluminium; olive wood; marbled resin",
        adjectives="slender; classic; balanced; graceful; fine; restrained",
        details="a steel nib > glide across the paper; a spring clip > hold it in the pocket; "
        "a screw cap > close without a sound; a piston filler > draw ink from the bottle; "
        "a hexagonal barrel > stop it rolling off the desk; a gold nib > give the line character; "
        "a small window > show how much ink is left; a tapered grip > guide the fingers",
        deeds="write in a smooth and even line; rest lightly in the hand; start at the first stroke; "
        "make every letter a pleasure; balance perfectly with its cap; turn notes into handwriting",
        places="on a writing desk; in a shirt pocket; in a lecture hall; at the signing of a treaty; in a study",
        users="writers; students; teachers; calligraphers; lovers of letters",
        occasions="when I write letters; for my diary; for every signature; at lectures",
    ),
    _category(
        "Kitchen Knife",
        "knife",
        (110, 320),
        materials="forged steel; layered Damascus steel; stainless steel; carbon steel",
        adjectives="sharp; balanced; precise; handy; robust; classic",
        details="a thin blade > slice without pressure; a walnut handle > lie warm in the hand; "
        "a full tang > give it balance; a rounded spine > protect the finger; "
        "a hammered surface > release the slices; a fine edge > stay sharp for months; "
        "a wide heel > crush garlic; a steel rivet > hold the handle for life",
        deeds="cut herbs and roast with equal ease; glide through ripe tomatoes; keep its edge for years; "
        "rest safely in the hand; make slicing a pleasure; serve amateurs and chefs alike",
        places="on a chopping board; in a professional kitchen; on a long table; beside the stove; in a home kitchen",
        users="chefs; home cooks; vegetable lovers; culinary students; hosts",
        occasions="every evening; when I chop herbs; for the Sunday roast; whenever I cook",
    ),
    _category(
        "Frying Pan",
        "pan",
        (900, 2600),
        materials="cast iron; carbon steel; recycled aluminium; layered steel and copper; ceramic-coated aluminium",
        adjectives="robust; even; versatile; sturdy; honest; simple",
        details="a thick base > spread the heat evenly; a long handle > stay cool; "
        "a pouring lip > drain fat cleanly; a ceramic coating > keep eggs from sticking; "
        "a second grip > help with heavy dishes; a low rim > make turning easy; "
        "a riveted joint > last a lifetime; a brass hook > allow it to hang on the wall",
        deeds="sear meat at high heat; move from the stove to the oven; heat evenly right to the rim; "
        "clean with a little hot water; improve with every use; suit every kind of stove",
        places="on the stove; in the oven; over an open fire; in a professional kitchen; at the table",
        users="home cooks; chefs; families; campers; lovers of breakfast",
        occasions="for Sunday pancakes; every evening; when I fry fish; for quick lunches",
    ),
    _category(
        "Teapot",
        "teapot",
        (450, 1300),
        materials="white porcelain; glazed stoneware; heat-resistant glass; cast iron; matt ceramic",
        adjectives="delicate; friendly; warm; graceful; serene; charming",
        details="a short spout > pour without dripping; a bamboo handle > stay cool; "
        "a fine strainer > hold back the leaves; a sunken lid > stay in place while pouring; "
        "a thick wall > keep the tea warm; a small cork foot > protect the table; "
        "a hand-applied glaze > make each piece unique; a wide opening > simplify cleaning",
        deeds="bring calm to the table; serve four cups of tea; keep its warmth for an hour; "
        "pour in a clean arc; turn tea into a small ceremony; feel pleasant in both hands",
        places="at the breakfast table; on a tray; in a tea house; on a garden table; in a quiet kitchen",
        users="tea drinkers; hosts; families; lovers of ceramics; quiet readers",
        occasions="every afternoon; when my sister visits; on rainy days; after dinner",
    ),
    _category(
        "Sofa",
        "sofa",
        (38000, 92000),
        materials="wool felt; woven linen; recycled cotton; soft leather; velvet and oak; quilted fabric",
        adjectives="generous; soft; inviting; modular; low; comfortable",
        details="a deep seat > invite one to linger; a removable cover > allow washing; "
        "a folding armrest > turn it into a bed; a slender frame > lift it off the floor; "
        "a loose cushion > support the back; a hidden zip > ease the change of covers; "
        "a wide armrest > hold a cup or a book; a spring core > keep its shape for years",
        deeds="welcome the whole family; adapt to rooms of every size; invite guests to stay; "
        "become a bed in a moment; offer softness without bulk; hold its shape over the years",
        places="in the living room; in a hotel lobby; in a loft; by the fireplace; in a waiting room",
        users="families; hosts; hotels; people in small flats; afternoon sleepers",
        occasions="every evening; on rainy Sundays; when we watch films; after work",
    ),
    _category(
        "Wall Clock",
        "clock",
        (350, 1900),
        materials="bent ash; powder-coated steel; brushed brass; matt ceramic; recycled plastic; cork",
        adjectives="quiet; legible; graphic; round; precise; friendly",
        details="a silent movement > make no sound; a bold numeral > be legible from afar; "
        "a curved glass > soften the light; a slim case > lie close to the wall; "
        "a red second hand > add a small accent; a single screw > fix it in a minute; "
        "a radio signal > set the time; a wooden rim > frame the dial",
        deeds="show the time across a large room; run for years on one battery; give the wall a calm centre; "
        "reduce time to two hands; keep time without a sound; suit old and new rooms alike",
        places="in the kitchen; in a classroom; in a railway station; above a desk; in the hallway",
        users="teachers; families; offices; schools; punctual people",
        occasions="in the kitchen; at breakfast; in my workshop; in our classroom",
    ),
    _category(
        "Washbasin",
        "basin",
        (8500, 24000),
        materials="white ceramic; mineral cast; enamelled steel; polished concrete; natural stone",
        adjectives="shallow; seamless; pure; slender; hygienic; generous",
        details="a thin rim > give it lightness; a hidden drain > preserve the clear surface; "
        "a flat shelf > hold soap and glass; a smooth glaze > repel lime; "
        "a soft inner curve > guide the water; a towel rail > save space; "
        "a wall fixing > keep the floor free; a raised edge > prevent splashing",
        deeds="bring clarity to the bathroom; clean with a single wipe; fit into the smallest bathroom; "
        "drain without a trace; combine strict lines with soft curves; save water and space",
        places="in a small bathroom; in a hotel bathroom; in a guest toilet; under a wide mirror; in a spa",
        users="architects; hotels; families; owners of small flats; planners",
        occasions="every morning; in our guest bathroom; when I wash my hands; twice a day",
    ),
    _category(
        "Shower Head",
        "shower",
        (220, 980),
        materials="chromed brass; brushed stainless steel; recycled plastic; black steel",
        adjectives="flat; generous; gentle; water-saving; pure; gleaming",
        details="a silicone nozzle > shed lime at a touch; a sliding switch > change the spray; "
        "a flow limiter > save water; a ball joint > turn in every direction; "
        "a slim plate > fall like summer rain; a long hose > reach every corner; "
        "a magnetic holder > catch it gently; a ring of lights > show the temperature",
        deeds="let water fall like warm rain; save a third of the water; switch between three sprays; "
        "clean in a moment; fit every common hose; make the morning more pleasant",
        places="in a small bathroom; in a spa; in a hotel bathroom; over a bathtub; at the swimming pool",
        users="families; hotels; athletes; planners; early risers",
        occasions="every morning; after sport; in our guest bathroom; when I need to relax",
    ),
    _category(
        "Electric Toothbrush",
        "brush",
        (90, 190),
        materials="recycled plastic; anodised aluminium; soft silicone; bamboo and steel",
        adjectives="slim; gentle; quiet; hygienic; handy; effective",
        details="a soft bristle head > protect the gums; a pressure sensor > warn against force; "
        "a timer > mark two minutes; a travel cap > keep the bristles clean; "
        "a long battery > last for four weeks; a ribbed handle > stay safe in wet hands; "
        "a charging glass > do without cables; a single button > start every programme",
        deeds="clean each tooth with care; run for a month on one charge; stand firmly on the washbasin; "
        "make brushing almost silent; remove plaque without pressure; fit into every toilet bag",
        places="on the washbasin; in a toilet bag; in the family bathroom; on a journey; on a narrow shelf",
        users="families; frequent travellers; people with sensitive gums; children; dentists",
        occasions="twice a day; on journeys; before bed; after every meal",
    ),
    _category(
        "Hairdryer",
        "dryer",
        (340, 760),
        materials="glass-fibre plastic; anodised aluminium; recycled plastic; soft-touch plastic",
        adjectives="lightweight; quiet; powerful; compact; handy; gentle",
        details="a ring nozzle > focus the air; a cool-air button > fix the style; "
        "a folding handle > save space in the suitcase; a digital motor > dry quickly and quietly; "
        "a removable filter > make cleaning easy; a heat sensor > protect the hair; "
        "a long cable > give freedom of movement; a soft grip > rest easily in the hand",
        deeds="dry long hair in four minutes; keep its temperature constant; make less noise than a conversation; "
        "protect the hair from heat; lie lightly in the hand; leave the hair smooth and glossy",
        places="in the bathroom; in a hair salon; in a hotel room; in the gym; on a journey",
        users="hairdressers; travellers; swimmers; families; people with long hair",
        occasions="every morning; after swimming; on journeys; before I go out",
    ),
    _category(
        "Sleeping Bag",
        "bag",
        (480, 1900),
        materials="recycled polyester; ripstop nylon and down; organic cotton; brushed fleece",
        adjectives="warm; lightweight; soft; compact; roomy; cosy",
        details="a drawstring hood > keep the head warm; a two-way zip > air the feet; "
        "a down filling > store the warmth; a shaped foot box > give the toes room; "
        "a draught collar > seal the shoulders; an inner pocket > hold a phone; "
        "a cotton lining > feel like home; a compression sack > halve the volume",
        deeds="keep its sleeper warm on frosty nights; pack down to the size of a melon; dry quickly after rain; "
        "leave room to turn over; weigh less than a jacket; turn any floor into a bed",
        places="in a tent; in a mountain hut; on the beach; under the open sky; in a camper van",
        users="hikers; mountaineers; scouts; families; festival guests",
        occasions="on long hikes; in mountain huts; when we go camping; on cold nights",
    ),
    _category(
        "Running Shoe",
        "shoe",
        (190, 340),
        materials="recycled knit; engineered mesh; coated fabric; merino wool and rubber",
        adjectives="lightweight; springy; agile; breathable; fast; cushioned",
        details="a foam midsole > return energy with each step; a knitted upper > fit like a sock; "
        "a rubber outsole > grip wet roads; a padded heel > prevent blisters; "
        "a carbon plate > add speed; a wide toe box > let the toes spread; "
        "a reflective stripe > glow in the dark; a removable insole > dry overnight",
        deeds="cushion every step; carry runners over long distances; grip safely on wet asphalt; "
        "weigh less than an apple; keep the foot cool and dry; roll smoothly from heel to toe",
        places="on asphalt; on forest paths; in the park; on the treadmill; at a city marathon",
        users="runners; beginners; marathon runners; early birds; trail runners",
        occasions="before breakfast; three times a week; on forest paths; when I train for a race",
    ),
    _category(
        "Suitcase",
        "suitcase",
        (2100, 5200),
        materials="ribbed polycarbonate; anodised aluminium; recycled plastic; vulcanised fibre; coated canvas",
        adjectives="robust; lightweight; roomy; manoeuvrable; smart; quiet",
        details="a telescopic handle > lock at three heights; a combination lock > keep belongings safe; "
        "a silent wheel > roll over cobblestones; a laundry bag > part clean from worn; "
        "a front pocket > give quick access to a laptop; a reinforced corner > absorb hard knocks; "
        "a leather tag > make it easy to recognise; a compression strap > keep shirts flat",
        deeds="roll beside its owner without effort; hold clothes for a week; fit into the overhead locker; "
        "survive rough handling; open like a wardrobe; forgive hasty packing",
        places="at the airport; on the night train; in a hotel room; on cobblestones; in the boot of a car",
        users="frequent travellers; families; flight crews; business travellers; weekend tourists",
        occasions="on business trips; whenever I fly; on the night train; for long weekends",
    ),
    _category(
        "Umbrella",
        "umbrella",
        (240, 620),
        materials="fibreglass and recycled polyester; ash wood and cotton; steel and nylon; carbon fibre",
        adjectives="windproof; compact; elegant; sturdy; light; colourful",
        details="a curved ash handle > hang from the arm; a vented canopy > let gusts pass; "
        "a flexible rib > bend without breaking; a push button > open it in a second; "
        "a quick-drying fabric > shake dry at the door; a reflective edge > make walkers visible; "
        "a short strap > keep it neatly rolled; a rounded tip > protect other passengers",
        deeds="withstand a storm; shelter two people; fit into a handbag; open and close with one hand; "
        "bring colour to grey days; dry in a few minutes",
        places="in the city; at the bus stop; in the wind by the sea; under a grey sky; on the way to the opera",
        users="walkers; commuters; theatre guests; travellers; people in rainy cities",
        occasions="on rainy mornings; when I walk the dog; all through November; on my way to the station",
    ),
    _category(
        "Toaster",
        "toaster",
        (1100, 2900),
        materials="brushed stainless steel; enamelled steel; polished aluminium; recycled plastic",
        adjectives="compact; cheerful; reliable; slim; gleaming; round",
        details="a wide slot > take thick slices; a crumb tray > slide out from the back; "
        "a folding rack > warm fresh rolls; a stepless dial > set the shade of brown; "
        "a lift lever > raise small slices; a cool wall > protect curious fingers; "
        "a small window > let one watch the toast; a cable spool > tidy the counter",
        deeds="brown every slice evenly; warm rolls in two minutes; clean in a moment; "
        "stop just before the toast is too dark; take little space; start the day with a pleasant smell",
        places="at the breakfast table; on a kitchen counter; in the office kitchen; in a holiday flat; by the kettle",
        users="families; students; early risers; lovers of breakfast; small cafes",
        occasions="every morning; on Sundays; for a quick supper; when the children come home",
    ),
    _category(
        "Cordless Drill",
        "drill",
        (950, 2100),
        materials="glass-fibre plastic; recycled plastic; magnesium alloy; impact-resistant plastic and rubber",
        adjectives="powerful; compact; handy; robust; precise; balanced",
        details="a keyless chuck > change bits in seconds; a ribbed grip > reduce vibration; "
        "a work light > brighten dark corners; a quick charger > fill the battery during a break; "
        "a belt clip > keep both hands free; a torque ring > spare delicate screws; "
        "a brushless motor > run longer; a level gauge > help to drill straight",
        deeds="drill through wood and steel; drive a hundred screws on one charge; reach into tight corners; "
        "rest well balanced in the hand; stop before a screw is damaged; survive a fall from a ladder",
        places="on the building site; in the workshop; on a ladder; in the garden shed; in a new flat",
        users="carpenters; hobby builders; electricians; people who move house; restorers",
        occasions="in my workshop; whenever something breaks; on weekends; when I build shelves",
    ),
    _category(
        "Garden Bench",
        "bench",
        (14000, 42000),
        materials="oiled teak; larch wood; powder-coated steel; recycled plastic; cast aluminium; robinia wood",
        adjectives="weatherproof; generous; inviting; rustic; light; sturdy",
        details="a curved back > follow the line of the spine; a wide armrest > hold a glass; "
        "a slatted seat > let the rain drain; a hidden screw > preserve the clear surface; "
        "a galvanised foot > resist rust; a folding table > carry a teapot; "
        "a stacking frame > save space in winter; a rounded edge > feel soft to the touch",
        deeds="invite neighbours to sit down; withstand wind and rain; seat three people in comfort; "
        "turn silver with the years; stay outdoors all winter; give a garden a quiet place",
        places="under an old tree; on the terrace; in a public park; beside the pond; in front of the house",
        users="gardeners; neighbours; city planners; grandparents; walkers",
        occasions="after work in the garden; on summer evenings; when the sun comes out; with a cup of tea",
    ),
    _category(
        "Water Bottle",
        "bottle",
        (140, 480),
        materials="double-walled steel; recycled glass; shatterproof plastic; anodised aluminium",
        adjectives="leakproof; lightweight; handy; slim; durable; fresh",
        details="a screw lid > seal without a drop; a carrying loop > hang from a backpack; "
        "a wide neck > take ice cubes; a silicone sleeve > soften knocks; "
        "a bamboo cap > give it a natural accent; a vacuum wall > keep drinks cold; "
        "a printed scale > count the sips; a straw lid > allow drinking on the move",
        deeds="keep water cold for a day; fit into every cup holder; replace a hundred plastic bottles; "
        "clean in the dishwasher; close tightly with half a turn; survive a fall on stone",
        places="on the desk; at the gym; on a hike; in a school bag; on a bicycle",
        users="athletes; pupils; commuters; hikers; office workers",
        occasions="at the gym; at my desk; on every hike; all day long",
    ),
    _category(
        "Keyboard",
        "keyboard",
        (420, 1300),
        materials="anodised aluminium; recycled plastic; oiled walnut and aluminium; sandblasted steel",
        adjectives="quiet; compact; precise; flat; tactile; wireless",
        details="a mechanical switch > give clear feedback; a dished key > guide the finger; "
        "a folding foot > set the angle; a backlight > make the letters visible at night; "
        "a split layout > relieve the wrists; a knurled wheel > set the volume; "
        "a long battery > last for half a year; a felt pad > muffle the stroke",
        deeds="make typing fast and quiet; switch between three computers; stay in place on smooth desks; "
        "reduce the reach of the fingers; fit into a flat bag; register the lightest stroke",
        places="on a desk; in an open office; in a recording studio; in a home office; on the train",
        users="programmers; writers; office workers; editors; players",
        occasions="when I write code; every working day; for long reports; at night",
    ),
    _category(
        "Air Purifier",
        "purifier",
        (2400, 8200),
        materials="recycled plastic; woven fabric and steel; perforated aluminium; bent wood and steel",
        adjectives="quiet; compact; discreet; effective; cylindrical; calm",
        details="a round filter > catch pollen and smoke; a fine sensor > measure the air; "
        "a ring of light > show the quality of the air; a fabric cover > come off for washing; "
        "a night mode > dim the display; a large fan > turn slowly and silently; "
        "a leather loop > make it easy to carry; a single dial > set the speed",
        deeds="clean the air of a large room; react to smoke at once; work silently through the night; "
        "use less power than a light bulb; remove smells after cooking; blend in with the furniture",
        places="in the bedroom; in a classroom; in a waiting room; beside the bed; in an open office",
        users="people with allergies; families; dentists; teachers; light sleepers",
        occasions="at night; in spring; after cooking; while we sleep",
    ),
    _category(
        "Headset",
        "headset",
        (180, 340),
        materials="anodised aluminium; recycled plastic; soft leather and steel; spring steel and foam",
        adjectives="lightweight; comfortable; clear; foldable; wireless; quiet",
        details="a padded headband > spread the pressure; a swivelling microphone > follow the mouth; "
        "a memory-foam cushion > adapt to the ear; a long battery > last for two days; "
        "a tactile button > mute the voice; a magnetic cable > come off before it tears; "
        "a folding hinge > save space in the bag; a noise filter > keep the street out",
        deeds="make voices sound natural; shut out the noise of the office; stay comfortable for hours; "
        "switch between phone and computer; fold flat for travel; reproduce music with depth",
        places="in an open office; on the train; in a call centre; at a home desk; in an aeroplane",
        users="office workers; musicians; commuters; players; support teams",
        occasions="during long calls; on the train; when I need silence; in the evening",
    ),
)
