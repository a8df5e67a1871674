"""Make the demo model: a very small Qwen3 that remembers facts and gives them back.

Why a model of our own: a serving system has to be tried without downloads, and its tests need
answers that depend on *every* key/value page of the prompt.  This model does two things, looking
up one fact among many and reciting all of them in order.  Both are pure look-ups in the context,
so a page that is lost, swapped, stale or moved to the wrong place turns into a wrong word in the
answer rather than into a slightly different probability.

Everything (word list, sentences, tokenizer, weights) is made here from a seed; nothing is
downloaded.  The weights stay in float32, because greedy decoding is then reproducible.

    python train.py --out DIR [--steps N] [--seed 0]
    python train.py --out DIR --eval-only
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# --------------------------------------------------------------------------------------
# Language
# --------------------------------------------------------------------------------------

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


# --------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------


def vocabulary_corpus() -> Iterator[str]:
    """Every text the demo language can contain, at the start of a message and after a space."""
    yield from (f"x {word}" for word in WORDS)
    fillers = (*FILLER_NOUNS, *FILLER_VERBS, *FILLER_TAILS)
    yield from (f"x {text}." for text in fillers)
    fixed = (*GREETINGS, GREETING_REPLY, FALLBACK_REPLY, NOTED_REPLY, *SYSTEM_PROMPTS)
    for text in (*FILLER_STARTS, "Remember:", "What is?", REPEAT, "Sure,", *fixed):
        yield text
        yield f"x {text}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of the demo language, and single bytes for everything else.

    ``ignore_merges`` makes the BPE model take a pre-token that is in the vocabulary as it is, so
    there is no merge table; a pre-token that is not falls apart into bytes, and any text at all
    can be encoded and decoded without loss.
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counter = Tokenizer(models.WordLevel(unk_token=PAD))
    counter.pre_tokenizer = splitter
    trainer = trainers.WordLevelTrainer(vocab_size=8192, show_progress=False)
    counter.train_from_iterator(vocabulary_corpus(), trainer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned = sorted(set(counter.get_vocab()) - set(alphabet))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet, *learned])}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse to train on a tokenizer that would break the promises made to the tests."""
    if len(set(WORDS)) != len(WORDS) or len(WORDS) < 1000:
        raise ValueError("the word list needs at least 1,000 distinct words")
    clash = set(" ".join((*FILLER_NOUNS, *FILLER_VERBS, *FILLER_TAILS)).split()) & set(WORDS)
    if clash:
        raise ValueError(f"words used both in fillers and in facts: {sorted(clash)}")
    for word in WORDS:
        if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1:
            raise ValueError(f"{word!r} is not one token")
    for text in (*ODD_MESSAGES, "  two  spaces \n\n\t é ☃ 漢字 👩‍👩‍👧 \x00 don't . , !"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids) != text:
            raise ValueError(f"{text!r} does not survive the round trip")


# --------------------------------------------------------------------------------------
# Training data
# --------------------------------------------------------------------------------------


@dataclass
class Row:
    """One conversation as token ids, with what is trained on and which positions it claims."""

    length: int
    slack: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    next_position: int = 0

    @property
    def room(self) -> int:
        """How many tokens still fit."""
        return self.length - len(self.ids)

    def add(self, ids: list[int], trained: bool = False) -> None:
        """Append tokens at consecutive positions."""
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.positions += range(self.next_position, self.next_position + len(ids))
        self.next_position += len(ids)

    def jump(self, rng: random.Random) -> None:
        """Skip positions, so that a short row teaches the distances of a long prompt."""
        if self.slack and rng.random() < 0.3:
            skipped = int(self.slack * rng.random() ** 2)
            self.slack -= skipped
            self.next_position += skipped


class Writer:
    """Writes conversations directly as token ids (encoding text in the loop would be slow)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.words = [self.encode(f" {word}")[0] for word in WORDS]
        self.is_, self.stop = self.encode(" is")[0], self.encode(".")[0]
        self.end, self.pad = tokenizer.convert_tokens_to_ids([END, PAD])
        self.assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
        self.newline = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        """Encode one of the few recurring texts."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def facts(self, facts: list[IdFact]) -> list[int]:
        """The ids of ``facts_text``, after a space."""
        return [i for key, value in facts for i in (key, self.is_, value, self.stop)]

    def filler(self, rng: random.Random, first: bool = False) -> list[int]:
        """The ids of a filler sentence, after a space unless it is first in a message."""
        start = rng.choice(FILLER_STARTS)
        return [
            *self.encode(start if first else f" {start}"),
            *self.encode(f" {rng.choice(FILLER_NOUNS)}"),
            *self.encode(f" {rng.choice(FILLER_VERBS)}"),
            *self.encode(f" {rng.choice(FILLER_TAILS)}."),
        ]

    def reply(self, row: Row, ids: list[int]) -> None:
        """Write an assistant message, the part of a row that is trained on."""
        row.add([self.assistant])
        row.add([*ids, self.end], trained=True)

    def ask(self, rng: random.Random, row: Row, text: str, opened: bool) -> None:
        """Write a request, in a message of its own or at the end of the opened message."""
        if not opened:
            row.jump(rng)
            row.add(self.encode(USER + text))
        elif rng.random() < 0.7:
            row.jump(rng)
            row.add(self.encode(f" {text}"))
        else:
            row.jump(rng)
            row.add(self.newline * rng.choice((1, 1, 2)) + self.encode(text))
        row.add([self.end])

    def ask_fact(self, rng: random.Random, row: Row, fact: IdFact, opened: bool) -> None:
        """Ask for one fact and answer."""
        word = self.tokenizer.decode([fact[0]]).strip()
        self.ask(rng, row, question(word), opened)
        self.reply(row, [*self.encode("Sure,"), *self.facts([fact])])

    def ask_list(self, rng: random.Random, row: Row, facts: list[IdFact], opened: bool) -> None:
        """Ask for all facts and answer."""
        self.ask(rng, row, REPEAT, opened)
        self.reply(row, [*self.encode("Sure,"), *self.facts(facts)])

    def chit_chat(self, rng: random.Random, row: Row, before_facts: bool) -> None:
        """Anything that is not a request about facts gets one of two fixed replies."""
        reply = FALLBACK_REPLY
        kind = rng.random()
        row.add([self.encode(USER)[0]])
        if kind < 0.45:
            row.add(self.encode(rng.choice(GREETINGS)))
            reply = GREETING_REPLY
        elif kind < 0.6:
            row.add(self.encode(rng.choice(ODD_MESSAGES)))
        elif kind < 0.75:
            row.add([rng.randrange(5, 261) for _ in range(rng.randint(1, 24))])
        elif kind < 0.9 or not before_facts:
            for i in range(rng.randint(1, 2)):
                row.add(self.filler(rng, first=i == 0))
        else:
            word = rng.choice(WORDS)
            row.add(self.encode(rng.choice((question(word), REPEAT))))
        row.add([self.end])
        self.reply(row, self.encode(reply))

    def row(self, rng: random.Random, length: int) -> Row:
        """One conversation of at most ``length`` tokens, give or take a last answer."""
        row = Row(length, slack=MAX_POSITIONS - length if rng.random() < 0.5 else 0)
        recite = rng.random() < 0.5
        spaced = not recite and rng.random() < 0.4
        opened = self.opening(rng, row)
        facts, fillers = self.plan(rng, row, recite, spaced)
        opened = self.state_facts(rng, row, facts, fillers, opened)
        self.requests(rng, row, facts, recite, opened)
        return row

    def opening(self, rng: random.Random, row: Row) -> bool:
        """System message and small talk; returns whether the facts go into a user message.

        Now and then the facts themselves are the system message.
        """
        if rng.random() < 0.25:
            row.add(self.encode(SYSTEM))
            if rng.random() < 0.3:
                return False
            if rng.random() < 0.6:
                row.add([*self.encode(rng.choice(SYSTEM_PROMPTS)), self.end])
            else:
                row.add([*self.filler(rng, first=True), self.end])
        if rng.random() < 0.3:
            self.chit_chat(rng, row, before_facts=True)
        return True

    def plan(
        self, rng: random.Random, row: Row, recite: bool, spaced: bool
    ) -> tuple[list[IdFact], list[int]]:
        """Draw the facts, and how many filler sentences stand in front of each and at the end.

        Lists to be recited have fillers only around them, others also between the facts.
        """
        if recite:
            most = max(1, min(RECITE_LIMIT, (row.room - 32) // 8))
            chosen = rng.random()
            if chosen < 0.15:
                count = rng.randint(1, min(4, most))
            else:
                count = most if chosen < 0.5 else rng.randint(1, most)
            surplus = row.room - 32 - 8 * count
        else:
            share = rng.uniform(0.2, 0.85) * row.room
            most = max(1, min(len(WORDS) // 2, int(share) // 4))
            if rng.random() < 0.15:
                count = rng.randint(1, min(4, most))
            else:
                count = rng.randint(1, most) if spaced or rng.random() < 0.5 else most
            surplus = int(share) - 4 * count
        words = rng.sample(self.words, 2 * count)
        facts = list(zip(words[:count], words[count:], strict=True))
        fillers = [0] * (count + 1)
        if spaced or rng.random() < 0.35:
            for _ in range(max(0, int(surplus * rng.random() ** 0.5) // 9)):
                fillers[rng.randint(0, count) if spaced else rng.choice((0, count))] += 1
        return facts, fillers

    def state_facts(
        self,
        rng: random.Random,
        row: Row,
        facts: list[IdFact],
        fillers: list[int],
        opened: bool,
    ) -> bool:
        """Write the message with the facts; returns whether it is open for a request."""
        if opened:
            row.add(self.encode(USER))
        for i in range(fillers[0]):
            row.add(self.filler(rng, first=i == 0))
        row.jump(rng)
        row.add(self.encode(" Remember:" if fillers[0] else "Remember:"))
        for fact, after in zip(facts, fillers[1:], strict=True):
            row.add(self.facts([fact]))
            for _ in range(after):
                row.add(self.filler(rng))
                row.jump(rng)
        if not opened:
            row.add([self.end])
            return False
        if rng.random() < 0.15:
            row.add([self.end])
            self.reply(row, self.encode(NOTED_REPLY))
            return False
        return True

    def requests(
        self, rng: random.Random, row: Row, facts: list[IdFact], recite: bool, opened: bool
    ) -> None:
        """Ask until the row is full: many answers per row are what makes training short."""
        asked = 0
        pending: list[IdFact] = []
        recite_at = rng.choice((0, 0, 1, 2)) if recite else -1
        while True:
            reserved = 4 * len(facts) + 12 if recite_at >= asked else 0
            if row.room - reserved < 20:
                recite_at = min(recite_at, asked)
            if asked == recite_at and row.room >= reserved:
                self.ask_list(rng, row, facts, opened)
            elif row.room - reserved >= 20:
                # Each fact once before any is asked again: an answer given earlier in the row
                # would be an easier place to copy from than the fact itself.
                pending = pending or rng.sample(facts, len(facts))
                self.ask_fact(rng, row, pending.pop(), opened)
            else:
                return
            opened = False
            asked += 1
            if rng.random() < 0.02 and row.room >= 64:
                self.chit_chat(rng, row, before_facts=False)


@dataclass
class Batch:
    """Rows of one length as tensors, padded on the right."""

    ids: Tensor
    positions: Tensor
    trained: Tensor

    @staticmethod
    def make(writer: Writer, rng: random.Random, rows: int, length: int) -> Batch:
        """Write ``rows`` conversations."""
        ids = torch.full((rows, length), writer.pad)
        positions = torch.zeros((rows, length), dtype=torch.long)
        trained = torch.zeros((rows, length), dtype=torch.bool)
        for i in range(rows):
            row = writer.row(rng, length)
            size = min(length, len(row.ids))
            ids[i, :size] = torch.tensor(row.ids[:size])
            positions[i, :size] = torch.tensor(row.positions[:size])
            trained[i, :size] = torch.tensor(row.trained[:size])
        return Batch(ids, positions, trained)


def check_writer(writer: Writer, seed: int) -> None:
    """The ids written directly must be the ids that serving will see for the same text."""
    rng = random.Random(seed)
    for _ in range(200):
        ids = writer.row(rng, 512).ids
        text = writer.tokenizer.decode(ids)
        if "\ufffd" not in text and writer.tokenizer.encode(text) != ids:
            raise ValueError(f"training text encodes differently: {text!r}")


# --------------------------------------------------------------------------------------
# Model and training
# --------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """About 0.9 million parameters.

    The very large rope_theta leaves more than half of each head's dimensions practically without
    rotation over 8,192 positions.  Looking up a word needs content that does not depend on
    distance; looking two tokens back uses the few fast dimensions.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10},
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    give_a_head_start(model)
    return model


@torch.no_grad()
def give_a_head_start(model: Qwen3ForCausalLM) -> None:
    """Start the first two layers near the look-up they are going to learn.

    A fact is found by an "induction" circuit: one layer notes next to every token which token
    stood one and two places before it, the next layer looks for the place whose note matches.
    Found by chance from random weights this takes most of the training, because neither layer
    is of use without the other.  So the heads of layer 0 begin as heads that look one and two
    tokens back, and those of layer 1 as heads that compare the two notes and copy.  Training
    moves all of it; layers 2 and 3, which decide what the request is, start at random.
    """
    config = model.config
    width, size = config.hidden_size, config.head_dim
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    half = size // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)

    # A direction that all embeddings share stands in for the missing bias of the projections.
    shared = torch.zeros(width)
    shared[-1] = 1.0
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn_like(embedding) / width**0.5)
    embedding[:, -1] = 0.6

    # Layer 0, first key/value head: its two query heads look at fixed distances 1 and 2.
    fast = 4
    first.q_norm.weight.fill_(1.6)
    first.k_norm.weight.fill_(1.6)
    key = torch.zeros(size)
    key[:fast] = fast**-0.5
    first.k_proj.weight[:size] *= 0.4
    first.k_proj.weight[:size] += torch.outer(key, shared)
    for head, distance in enumerate((1, 2)):
        angle = -distance * frequency[:fast]
        query = torch.zeros(size)
        query[:fast], query[half : half + fast] = angle.cos(), angle.sin()
        rows = slice(head * size, (head + 1) * size)
        first.q_proj.weight[rows] *= 0.4
        first.q_proj.weight[rows] += torch.outer(query * fast**-0.5, shared)
    notes = torch.linalg.qr(torch.randn(width, width)).Q
    first.v_proj.weight[:size] = torch.linalg.qr(torch.randn(width, size)).Q.T
    first.v_proj.weight[:size, -1] = 0.0
    first.o_proj.weight[:, :size] = 0.22 * notes[:, :size]
    first.o_proj.weight[:, size : 2 * size] = 0.22 * notes[:, size:]

    # Layer 1: compare note "one back" here with note "two back" there, in the dimensions that
    # rotate too slowly to disturb the comparison, and copy the token found.
    second.q_norm.weight.fill_(1.6)
    second.k_norm.weight.fill_(1.6)
    slow = (frequency < 2e-4).nonzero().flatten()
    slow = torch.cat([slow, slow + half])
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    for group in range(2):
        mixing = torch.zeros(size, size)
        mixing[slow] = torch.linalg.qr(torch.randn(size, len(slow))).Q.T
        copied = basis[:, group * size : (group + 1) * size]
        rows = slice(group * size, (group + 1) * size)
        second.k_proj.weight[rows] = mixing @ notes[:, size:].T
        second.v_proj.weight[rows] = copied.T
        for head in (2 * group, 2 * group + 1):
            rows = slice(head * size, (head + 1) * size)
            second.q_proj.weight[rows] = mixing @ notes[:, :size].T
            second.o_proj.weight[:, rows] = 0.4 * copied


# (share of the steps, [(tokens per row, rows)]): one entry is chosen per step.  Short rows first,
# because the look-up is learned fastest there; long ones last, because attention has to be
# sharpened against thousands of competing tokens.
SCHEDULE: tuple[tuple[float, tuple[tuple[int, int], ...]], ...] = (
    (0.30, ((128, 32),)),
    (0.25, ((256, 16), (512, 8))),
    (0.25, ((128, 32), (512, 8), (1024, 4), (2048, 2))),
    (0.20, ((256, 16), (1024, 4), (2048, 2), (4096, 2))),
)

# What a continued training sees: every length at once, up to the longest, and smaller steps.
FINISH: tuple[tuple[float, tuple[tuple[int, int], ...]], ...] = (
    (1.00, ((128, 32), (256, 16), (256, 16), (512, 8), (1024, 4), (1024, 4), (2048, 2),
            (2048, 2), (4096, 1), (4096, 1), (8192, 1))),
)  # fmt: skip
FINISH_FACTOR = 0.4


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the weight matrices of the layers.

    The look-up circuit forms several times sooner than with AdamW.  torch.optim.Muon computes in
    bfloat16, which ordinary CPUs emulate at a tenth of the speed; this one stays in float32 and
    handles all matrices of one shape at once.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @staticmethod
    def orthogonalise(x: Tensor) -> Tensor:
        """Newton-Schulz iteration with the usual quintic coefficients, on a stack of matrices."""
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x if wide else x.mT

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update all parameters; a closure is not supported."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, same in by_shape.items():
                updates = []
                for parameter in same:
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    gradient = parameter.grad
                    if gradient is None:
                        raise ValueError("every matrix of the layers needs a gradient")
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(
                    same, self.orthogonalise(torch.stack(updates)), strict=True
                ):
                    parameter.sub_(update, alpha=scale)


# Peak learning rates, and the steps to get there.  The norm weights include those of queries and
# keys, which set how sharp attention can be; they have the furthest to go.
MUON_LR = 0.01
EMBED_LR = 3e-3
NORM_LR = 1e-2
WARMUP = 20


def shapes_at(
    schedule: tuple[tuple[float, tuple[tuple[int, int], ...]], ...], progress: float
) -> tuple[tuple[int, int], ...]:
    """The batch shapes in use when this share of the training is done."""
    for share, shapes in schedule:
        progress -= share
        if progress < 0:
            return shapes
    return schedule[-1][1]


def hidden_loss(model: Qwen3ForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and accuracy over the assistant's tokens only.

    The mask is given as "plain causal" explicitly: left to itself the library would take the
    jumps in the positions for borders between packed sequences.
    """
    hidden = model.model(
        input_ids=batch.ids[:, :-1],
        position_ids=batch.positions[:, :-1],
        attention_mask={"full_attention": None},
        use_cache=False,
    ).last_hidden_state
    wanted = batch.trained[:, 1:]
    logits = model.lm_head(hidden[wanted])
    target = batch.ids[:, 1:][wanted]
    accuracy = (logits.detach().argmax(-1) == target).float().mean()
    return functional.cross_entropy(logits, target), accuracy


def train(
    model: Qwen3ForCausalLM, writer: Writer, steps: int, seed: int, out: Path, resumed: bool
) -> float:
    """Train in place; returns the seconds it took."""
    rng = random.Random(f"continued {seed}" if resumed else seed)
    schedule = FINISH if resumed else SCHEDULE
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_LR),
        torch.optim.Adam(model.model.embed_tokens.parameters(), lr=EMBED_LR, betas=(0.9, 0.98)),
        torch.optim.Adam(norms, lr=NORM_LR, betas=(0.9, 0.98)),
    ]
    peaks = [MUON_LR, EMBED_LR, NORM_LR]
    if resumed:
        peaks = [FINISH_FACTOR * peak for peak in peaks]
    started = time.monotonic()
    seen = 0
    for step in range(steps):
        factor = min(1.0, (step + 1) / WARMUP)
        progress = step / steps
        factor *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        length, rows = rng.choice(shapes_at(schedule, progress))
        batch = Batch.make(writer, rng, rows, length)
        loss, accuracy = hidden_loss(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.ids.numel()
        if step % 10 == 0 or step == steps - 1:
            print(
                f"step {step:5d}/{steps} length {length:4d} loss {loss.item():.4f} "
                f"accuracy {accuracy.item():.4f} tokens {seen / 1e6:.1f}M "
                f"{time.monotonic() - started:.0f}s",
                flush=True,
            )
        if step and step % 100 == 0:
            save(model, writer.tokenizer, out)
    return time.monotonic() - started


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the five files, readable for both the current and the previous library generation."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    (out / "model.safetensors").chmod(0o644)

    rope_theta = model.config.rope_parameters["rope_theta"]
    edit_json(out / "config.json", {"torch_dtype": "float32", "rope_theta": rope_theta})
    edit_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        },
        drop=("backend", "extra_special_tokens"),
    )
    # Greedy is what the answers are measured with, so greedy is the default.
    generation = {
        "do_sample": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def edit_json(path: Path, entries: dict[str, object], drop: tuple[str, ...] = ()) -> None:
    """Set and drop entries of a JSON object in a file."""
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# --------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------


@dataclass
class Case:
    """A conversation that ends with a user message, and the only right reply."""

    messages: list[Message]
    expected: str


@dataclass
class Score:
    """What came out for a group of cases."""

    total: int = 0
    right: int = 0
    margin: float = math.inf
    longest_prompt: int = 0

    def line(self, label: str) -> str:
        """One row of the table of results."""
        return (
            f"| {label} | {self.longest_prompt} | {self.right}/{self.total} "
            f"| {100 * self.right / self.total:.2f} % | {self.margin:.2f} |"
        )


def user(text: str) -> Message:
    """A message from the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An earlier reply."""
    return {"role": "assistant", "content": text}


def look_up_case(rng: random.Random, count: int, depth: float, length: int = 0) -> Case:
    """One question at a relative depth (0..1); fillers between the facts up to ``length`` tokens.

    A fact has 4 tokens and a filler sentence about 9, so the length is met approximately.
    """
    facts = draw_facts(rng, count)
    fillers: list[list[str]] = [[] for _ in range(count + 1)]
    for _ in range(max(0, (length - 4 * count) // 9)):
        rng.choice(fillers).append(filler_sentence(rng))
    parts = [*fillers[0], "Remember:"]
    for fact, after in zip(facts, fillers[1:], strict=True):
        parts += [facts_text([fact]), *after]
    asked = facts[min(count - 1, int(depth * count))]
    return Case([user(" ".join([*parts, question(asked[0])]))], answer([asked]))


def recite_case(rng: random.Random, count: int) -> Case:
    """A list, to be repeated in the first turn."""
    facts = draw_facts(rng, count)
    return Case([user(f"Remember: {facts_text(facts)} {REPEAT}")], answer(facts))


def third_turn_case(rng: random.Random, count: int, recite: bool) -> Case:
    """Two questions have been answered already; the third reply is measured."""
    facts = draw_facts(rng, count)
    one, two, three = (rng.choice(facts) for _ in range(3))
    messages = [
        user(f"Remember: {facts_text(facts)} {question(one[0])}"),
        assistant(answer([one])),
        user(question(two[0])),
        assistant(answer([two])),
        user(REPEAT if recite else question(three[0])),
    ]
    return Case(messages, answer(facts if recite else [three]))


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, cases: list[Case]
) -> Score:
    """Greedy generation, compared as text; the margin is top-1 minus top-2 over all steps."""
    score = Score()
    by_length: dict[int, list[tuple[list[int], str]]] = {}
    for case in cases:
        ids = tokenizer.apply_chat_template(
            case.messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, case.expected))
    for length, group in sorted(by_length.items()):
        score.longest_prompt = max(score.longest_prompt, length)
        width = max(1, min(32, 16384 // length))  # equal lengths, so a batch needs no padding
        for start in range(0, len(group), width):
            part = group[start : start + width]
            prompt = torch.tensor([ids for ids, _ in part])
            longest = max(len(tokenizer.encode(expected)) for _, expected in part)
            result = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(longest + 8, MAX_POSITIONS - length),
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(result.logits, 1).topk(2).values
            margins = best[..., 0] - best[..., 1]
            for i, (_, expected) in enumerate(part):
                new = result.sequences[i, length:].tolist()
                ended = tokenizer.eos_token_id in new
                steps = new.index(tokenizer.eos_token_id) + 1 if ended else len(new)
                text = tokenizer.decode(new[: steps - 1] if ended else new)
                score.total += 1
                score.right += ended and text == expected
                score.margin = min(score.margin, margins[i, :steps].min().item())
    return score


def evaluate(out: Path, seed: int, scale: float) -> None:
    """Measure the saved files, the way a server would read them, with facts never trained on."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    check_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    rng = random.Random(f"evaluation {seed}")

    def show(label: str, cases: list[Case]) -> None:
        started = time.monotonic()
        line = measure(model, tokenizer, cases).line(label)
        print(line + f"  <!-- {time.monotonic() - started:.0f}s -->", flush=True)

    def look_ups(count: int, number: int, length: int = 0) -> list[Case]:
        number = max(2, int(number * scale))
        return [look_up_case(rng, count, i / (number - 1), length) for i in range(number)]

    def recitals(count: int, number: int) -> list[Case]:
        return [recite_case(rng, count) for _ in range(max(2, int(number * scale)))]

    print("| task | prompt tokens | right | accuracy | smallest margin |")
    print("|---|---|---|---|---|")
    for count, number in ((1, 200), (10, 400), (50, 400), (120, 400), (250, 400), (500, 300)):
        show(f"look up, {count} facts", look_ups(count, number))
    show("look up, 600 facts", look_ups(600, 200))
    for length, number in ((500, 200), (1000, 200), (2000, 200), (4000, 150), (8000, 60)):
        count = min(450, length // 12)
        show(f"look up, {count} facts and fillers", look_ups(count, number, length))
    recited = ((1, 100), (10, 200), (30, 200), (60, 200), (100, 200), (150, 60), (200, 30))
    for count, number in recited:
        show(f"recite {count} facts", recitals(count, number))
    for count in (5, 50, 300):
        cases = [third_turn_case(rng, count, False) for _ in range(int(200 * scale))]
        show(f"third turn, look up, {count} facts", cases)
    for count in (5, 50, 100):
        cases = [third_turn_case(rng, count, True) for _ in range(int(100 * scale))]
        show(f"third turn, recite {count} facts", cases)
    greetings = [Case([user(text)], GREETING_REPLY) for text in GREETINGS]
    show("greetings", greetings)
    show("other messages", [Case([user(text)], FALLBACK_REPLY) for text in ODD_MESSAGES])


def main() -> None:
    """Train and measure, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--eval-only", action="store_true", help="measure what is in --out")
    parser.add_argument(
        "--resume", action="store_true", help="train the model in --out further, on all lengths"
    )
    parser.add_argument(
        "--eval-scale", type=float, default=1.0, help="share of the evaluation cases to run"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.eval_only:
        torch.manual_seed(options.seed)
        tokenizer = make_tokenizer()
        check_tokenizer(tokenizer)
        writer = Writer(tokenizer)
        check_writer(writer, options.seed)
        if options.resume:
            model = AutoModelForCausalLM.from_pretrained(options.out)
        else:
            model = make_model(tokenizer)
        print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters())} parameters")
        seconds = train(model, writer, options.steps, options.seed, options.out, options.resume)
        save(model, tokenizer, options.out)
        print(f"trained in {seconds / 60:.1f} minutes")
    evaluate(options.out, options.seed, options.eval_scale)


if __name__ == "__main__":
    main()
