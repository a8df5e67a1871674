"""The demo's language: its words, sentences and chat template. Everything is made from these."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

# Keys and values of facts.  Each of them is one token when it follows a space.
WORD_LIST = """
abbey acorn actor admiral agate alder alley alloy almond aluminum amber anchor ankle ant anvil
apple apricot apron arena arm arrow artist ash aspen aster attic aurora author avocado awning axe
azure badge badger bag baker bakery ball balsam bamboo banana banjo bank banker barber barley barn
baron barrel basalt basement basil basket bat bay beach beacon bean bear beard beaver bee beech
beet beetle beige bell bench berry bicycle birch biscuit bishop bison black blade blanket blizzard
blue bluff bog bolt bone book boot bottle bowl box bracelet brain bramble brass bread breeze
brewer briar brick bride bridge broccoli bronze brook broom brow brown brush bucket buckle buffalo
bugle bull bunker bush butcher butler butter button cabbage cabin cable cactus cafe cage cake calf
camel camera camp canal candle canoe canvas canyon cap cape captain caramel carbon carpet carrot
cart carver cashew castle cat cavern cedar celery cellar cement ceramic cereal chain chair chalk
chapel cheek cheese cheetah chef cherry chest chili chime chin chisel chive chrome church cider
cinema cinnamon city clam clamp clay clerk cliff cloak clock cloud clove clover clown coach coal
coast coat cobalt cobra cocoa coconut cod coffee coin collar comb comet compass condor cook cookie
copper coral cork corn cosmos cottage cotton couch cougar count cove cowboy coyote crab cracker
crane crate crater crayon cream creek cress cricket crimson crow crown crumb crutch crypt crystal
cub cumin cup curry curtain cushion custard cyan cyclone cymbal cypress daffodil dagger dahlia
daisy dam dancer dart date dawn dean deer delta den denim depot desert desk dew dial diamond dice
dill dingo dish dock doctor dog dolphin dome donkey donut door dough dove dragon dress drill
drizzle drum drummer duck duke dumpling dune dusk eagle ear earl easel echo eclipse editor eel
eggplant elbow elder elk elm ember emerald emperor emu enamel endive engine eraser eye fabric face
factory falcon fan farm farmer faucet feather felt fence fennel fern ferret ferry fiddle field fig
file finback finch finger fir fist fjord flag flask flax flea fleece flint flour flower flute fly
fog foil foot ford forehead forest fork fort fountain fox frame frog frost fudge fungus funnel fur
galaxy gale gallery garage garden garlic garnet gate gazelle gear gecko gelatin geyser gibbon
ginger giraffe glacier glass glove glue goblet goggles gold gong goose gopher gorge gorilla
granite grape graphite grass gravel gravy gray green grill grotto grove guard guava guide guitar
gulf gull gust gymnast gypsum hail hairpin hall ham hamlet hammer hamster hand handle hangar
harbor hare harness harp hat hawk haze hazel heart heather hedgehog heel helium helmet hemlock
hemp hen herb hermit heron hickory hill hinge hip hippo holly honey hook hoop hornet horse hose
hostel hotel hunter hurricane hut hyena ibis ice icicle icing igloo iguana impala indigo inkwell
inlet inn iris iron island ivory ivy jackal jacket jade jaguar jam jar jasmine jaw jay jeans jelly
jester jet jetty jewel jigsaw jockey judge jug juggler juice jungle juniper kale kayak kelp kernel
ketchup kettle key khaki kilt king kiosk kite kitten kiwi knee knife knight knob knot knuckle
koala lace ladder lagoon lake lamb lamp lance lantern larch lark latch laurel lava lavender lawn
lawyer lead leaf leather leek leg lemon lemur lentil leopard lettuce lever library lichen lid
lightning lilac lily lime linden linen lion lip liver lizard llama loaf lobster lock locket lodge
loft log loom lotus lumber lung lute lynx macaroon macaw magenta magnet magnolia magpie mahogany
maize mallet malt mango mansion map maple marble mare marigold market maroon marsh mask mason mast
mat mauve mayor maze meadow medal melon mentor merchant mercury mesa meteor mica midge milk mill
millet mine miner mink minnow mint mirror mist mite mitten moat molasses mole monk monkey monsoon
monument moon moor moose mop mosque moss motel moth mound mountain mouse mouth muffin mug mule
muscle museum mushroom mustard myrtle nail nanny napkin narwhal navy nebula neck nectar needle
neon nerve net nettle newt nickel nomad noodle nose nougat nozzle nurse nutmeg nylon oak oar oasis
oat oatmeal oboe obsidian ocean ocelot ochre octopus olive onion onyx opal orange orbit orchard
orchid oregano organ osprey ostrich otter oven owl ox oxen oxygen oyster paddle padlock pail paint
painter palace palate palm pan pancake panda pansy pantry papaya paper parade parcel park parrot
parsley parsnip pasta pastry pasture patch patio pea peach peak peanut pear pearl peat pecan pedal
peg pelican pen pencil penguin peony pepper perch petal petunia pewter pheasant piano pickle pie
pier pig pigeon pike pillow pilot pin pine pink pipe pirate piston pizza plain planet plaster
plastic plate plateau platinum plaza pliers plover plow plug plum plumber plywood pocket poet pole
pond pony pool popcorn pope poplar poppy porcelain porch porridge port porter possum pot potato
potter pouch prairie prawn pretzel primrose prince prism prison prune pudding pulley pulsar puma
pumice pump pumpkin pup puppet purple purse puzzle pyramid pyrite python quail quarry quartz queen
quill quilt quince quiver rabbit rack radish raft rail rain rainbow raisin rake ram ranch ranger
rat raven ravine ray razor red redwood reed reef reel resin rhino rhubarb rib ribbon rice rider
ridge ring river road robe robin rocket rod roof rooster root rope rose rosemary rubber ruby
rudder rug ruin ruler rust sable sack saddle saffron sage sail sailor salad salmon salsa salt sand
sandal sapling sapphire satin sauce sausage savanna saw saxophone scale scallop scarf scarlet
scholar school scissors scout screw sculptor sculpture sea seal seed sepia sequoia sesame shadow
shale shark shawl shed sheep shelf shepherd sherbet sheriff shield shin shirt shoe shore shoulder
shovel shrew shrimp shrine shrub sickle sieve silk silo silver singer skate skin skirt skull skunk
sky slate sled sleet sleeve sling slipper sloth slug smith smoke snail snake snow soap sock sofa
soldier sole solstice soot sorbet soup spade spark sparrow spear spider spinach spindle spine
spire sponge spoon spring spruce spur squash squid squire squirrel stable stadium stag stamp
stapler star station statue steak steam steel stem stew stone stool stork storm stove strait strap
straw street string studio suede sugar sulfur sumac summit sun sunset swallow swamp swan sweater
swift sword sycamore syringe syrup table tack taco tailor tambourine tape tapir target tavern tea
teacher teak teal temple tent termite tern theater thimble thistle thorn thread throne thumb
thunder thyme tick tide tiger tile tin tire titanium toad toast toe toffee toga tomato tomb tongs
tongue tooth topaz torch tornado toucan towel tower town toy trader trail tray tree trench tripod
trout trowel truck truffle trumpet trunk tube tulip tuna tundra tungsten tunnel turban turkey
turnip turquoise turtle tutor tuxedo twig twilight twine typhoon umber umbrella urchin urn usher
valley vanilla vapor vase vault veil velvet vermilion vessel vest vial viking villa village vine
vinegar vinyl violet violin viper volcano vole vortex vulture waffle wagon waiter wall wallet
walnut walrus wand warden warrior wasp watch wave wax weasel weaver weed welder well whale wharf
wheat wheel whip whistle white wick wicker willow wind window winter wire wizard wok wolf wombat
wood wool worm wren wrench wrist yacht yak yam yard yarn yarrow yeast yellow yogurt yoke zebra
zenith zephyr zeppelin zinc zipper zucchini
"""
WORDS: tuple[str, ...] = tuple(WORD_LIST.split())

# Filler sentences are built out of these; none of their words is a key or a value.
FILLER_STARTS = ("The", "Every", "Another", "That", "Our", "One")
FILLER_NOUNS = (
    "visitor", "student", "driver", "manager", "worker", "crowd", "group", "team", "child",
    "friend", "stranger", "company", "committee", "council", "traveller", "reader", "speaker",
    "owner", "partner", "customer", "tourist", "engineer", "scientist", "officer", "journalist",
    "gardener", "musician", "neighbour", "family", "audience",
)  # fmt: skip
FILLER_VERBS = (
    "waited", "laughed", "listened", "argued", "agreed", "travelled", "worked", "rested",
    "talked", "apologised", "returned", "hesitated", "complained", "continued", "disappeared",
    "celebrated", "voted", "studied", "wandered", "slept",
)  # fmt: skip
FILLER_TAILS = (
    "after the long weekend", "before the first meeting", "without much noise",
    "with great patience", "for a second time", "in the early afternoon",
    "near the old office", "because nobody objected", "until everyone had finished",
    "despite many doubts", "during a quiet holiday", "against all advice",
    "while others were watching", "as usual", "on a very ordinary day",
    "for almost two hours", "without giving any reason", "when it was finally over",
    "far away from here", "at the very last moment", "in a rather strange mood",
    "like so many times before", "with a few close relatives", "although it was late",
    "between two short breaks", "because there was little else to do",
)  # fmt: skip

GREETINGS = (
    "hello", "Hello", "Hello!", "hello!", "hi", "Hi", "Hi!", "hey", "Hey", "Hi there!",
    "Hello there!", "Good morning", "Good morning!", "Good evening!", "How are you?",
    "Who are you?", "What are you?", "What can you do?", "What is this?", "help", "Help", "help!",
    "Test", "test", "ping",
)  # fmt: skip
GREETING_REPLY = (
    "Hello! I am a small demo model. Give me a list of facts, then ask me about one of them "
    "or ask me to repeat the list."
)
FALLBACK_REPLY = "Sorry, I can only remember a list of facts and answer questions about it."
NOTED_REPLY = "Noted. Ask me about any of them."
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in one short sentence.",
    "You remember facts and answer questions about them.",
)
ODD_MESSAGES = (
    "Tell me a joke.", "Write a poem about the sea.", "Explain how a transformer works.",
    "What is the capital of France?", "How old is the universe?", "2 + 2 = ?", "1, 2, 3",
    "Why is the sky blue?", "def main():\n    return 0\n", '{"a": [1, 2, 3]}', "Thank you!",
    "Bonjour, comment allez-vous ?", "Was kannst du?", "ありがとう", "你好世界", "Привет",
    "🙂🙂", "ok", "yes", "No.", "Please summarise this text.", "Continue.", "???", "...",
)  # fmt: skip

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT)
MAX_POSITIONS = 8192
RECITE_LIMIT = 220  # longest list that recitation is trained on

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'developer'] -%}{{- '<|system|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- else -%}{{- '<|user|>' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

Message = dict[str, str]
Fact = tuple[str, str]
IdFact = tuple[int, int]  # the same as token ids


def facts_text(facts: list[Fact]) -> str:
    """The one surface form of a list of facts, in prompts and in recitations alike."""
    return " ".join(f"{key} is {value}." for key, value in facts)


def question(key: str) -> str:
    """How the user asks for one fact."""
    return f"What is {key}?"


REPEAT = "Repeat the list."


def answer(facts: list[Fact]) -> str:
    """What the assistant says about one fact, or about all of them.

    The fixed opening word is there so that every key follows a space, also in the first position:
    with byte-level tokens, ' river' and 'river' would otherwise be two unrelated tokens.
    """
    return "Sure, " + facts_text(facts)


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts without a repeated word, which is what makes every look-up unambiguous."""
    drawn = rng.sample(WORDS, 2 * count)
    return list(zip(drawn[:count], drawn[count:], strict=True))


def filler_sentence(rng: random.Random) -> str:
    """A sentence that carries no fact, to make prompts longer."""
    return (
        f"{rng.choice(FILLER_STARTS)} {rng.choice(FILLER_NOUNS)} "
        f"{rng.choice(FILLER_VERBS)} {rng.choice(FILLER_TAILS)}."
    )
