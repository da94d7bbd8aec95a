"""Prompts for the demo's training data: this project's own templates filled with its own topics.

``python -m experiments.prompts train > FILE`` and ``python -m experiments.prompts held_out > FILE``
print JSONL rows ``{"id", "category", "prompt"}``. The list, its order and the split never change:
responses are committed by id. No prompt is taken from a benchmark.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from typing import TypedDict

#: Every tenth prompt of the shuffled list is held out of training.
HELD_OUT_EVERY = 10


class Prompt(TypedDict):
    id: str
    category: str
    prompt: str


def split(name: str) -> list[Prompt]:
    """Return the ``train`` or the ``held_out`` prompts, in their fixed order."""
    if name not in ("train", "held_out"):
        raise ValueError(f"split {name!r} does not exist; use train or held_out")
    held_out = name == "held_out"
    return [
        prompt
        for index, prompt in enumerate(_all_prompts())
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out
    ]


def _all_prompts() -> list[Prompt]:
    """Take the same share of every category, number the prompts within it, and shuffle."""
    chooser = random.Random(20)
    prompts: list[Prompt] = []
    for category, (texts, count) in _categories().items():
        distinct = list(dict.fromkeys(texts))
        chosen = chooser.sample(distinct, min(count, len(distinct)))
        prompts += [
            {"id": f"{category}-{number:03d}", "category": category, "prompt": text}
            for number, text in enumerate(chosen)
        ]
    chooser.shuffle(prompts)
    return prompts


def _categories() -> dict[str, tuple[Iterator[str], int]]:
    """Category to (all of its prompts, how many of them to use)."""
    return {
        "explain": (_fill(EXPLAIN, topic=SCIENCE + SOCIETY), 120),
        "how_to": (_fill(HOW_TO, task=TASKS), 80),
        "code": (_fill(CODE, language=LANGUAGES, function=FUNCTIONS), 130),
        "code_help": (_fill(CODE_HELP, snippet=SNIPPETS), 40),
        "maths": (_maths(), 110),
        "rewrite": (_fill(REWRITE, sentence=SENTENCES), 70),
        "list": (_fill(LIST, number=("three", "five", "seven"), thing=THINGS), 70),
        "story": (_fill(STORY, hero=HEROES, event=EVENTS), 80),
        "email": (_fill(EMAIL, purpose=PURPOSES), 60),
        "summary": (_fill(SUMMARY, passage=PASSAGES), 50),
        "extract": (_fill(EXTRACT, passage=PASSAGES), 50),
        "dialogue": (_fill(DIALOGUE, pair=PAIRS, subject=SUBJECTS), 60),
        "translate": (_fill(TRANSLATE, language=TONGUES, sentence=SENTENCES), 40),
        "compare": (_fill(COMPARE, pair=COMPARED), 60),
        "advice": (_fill(ADVICE, problem=PROBLEMS), 80),
    }


def _fill(templates: tuple[str, ...], **slots: tuple[str, ...]) -> Iterator[str]:
    """Every template with every combination of the values of its slots."""
    for template, *values in itertools.product(templates, *slots.values()):
        yield template.format(**dict(zip(slots, values, strict=True)))


def _maths() -> Iterator[str]:
    """Word problems with numbers drawn once from a fixed seed."""
    chooser = random.Random(21)
    for _, problem, ask in itertools.product(range(5), MATHS, MATHS_ASK):
        a, b, c = chooser.randint(3, 12), chooser.randint(13, 60), chooser.randint(2, 9)
        yield problem.format(a=a, b=b, c=c, hundred=100 * c, half=b / 2) + " " + ask


EXPLAIN = (
    "Explain {topic} to a curious ten-year-old.",
    "What is the main idea behind {topic}? Answer in one paragraph.",
    "Why does {topic} matter in everyday life?",
    "Give a short introduction to {topic}, with one concrete example.",
    "Which common misunderstandings do people have about {topic}?",
)
SCIENCE = (
    "gravity",
    "vaccination",
    "photosynthesis",
    "the water cycle",
    "plate tectonics",
    "black holes",
    "electric current",
    "natural selection",
    "the immune system",
    "antibiotic resistance",
    "the rechargeable battery",
    "sound waves",
    "the seasons",
    "the periodic table",
    "DNA",
    "radioactive decay",
    "tides",
    "the greenhouse effect",
    "machine learning",
    "public-key encryption",
    "the ranking of web pages",
    "binary numbers",
    "recursion",
    "probability",
    "compound interest",
)
SOCIETY = (
    "supply and demand",
    "inflation",
    "the separation of powers",
    "the printing press",
    "the Silk Road",
    "the industrial revolution",
    "voting systems",
    "copyright",
    "public libraries",
    "the Olympic Games",
    "urban planning",
    "fact-checking in newspapers",
    "the gig economy",
    "opportunity cost",
    "cultural festivals",
    "the history of chess",
    "perspective in painting",
    "jazz improvisation",
    "insurance",
    "the metric system",
)

HOW_TO = (
    "How do I {task}? Give me numbered steps.",
    "I have never done this before: how can I {task}?",
    "What do I need, and what should I watch out for, if I want to {task}?",
)
TASKS = (
    "bake a loaf of bread",
    "repair a flat bicycle tyre",
    "plant tomatoes on a balcony",
    "set up a home network",
    "prepare for a job interview",
    "write a personal budget",
    "learn the basics of the guitar",
    "pack for a week of hiking",
    "remove a coffee stain from a shirt",
    "train for a ten-kilometre run",
    "back up the photos on my phone",
    "make vegetable soup",
    "paint a bedroom wall",
    "organise a small conference",
    "start a compost heap",
    "sharpen a kitchen knife",
    "teach a child to swim",
    "choose a used car",
    "brew good coffee without a machine",
    "start a neighbourhood book club",
    "memorise a short speech",
    "build a simple wooden shelf",
    "clean a laptop keyboard",
    "photograph the night sky",
    "write a letter of complaint",
    "knit a scarf",
    "plan a birthday party for ten people",
    "reduce my electricity bill",
)

CODE = (
    "Write a {language} function that {function}.",
    "Show me how to write code in {language} that {function}, and explain it briefly.",
    "In {language}, implement and test a function that {function}.",
)
LANGUAGES = ("Python", "JavaScript", "C", "Java", "Go", "Rust", "SQL or Python", "Bash")
FUNCTIONS = (
    "reverses the words of a sentence",
    "counts how often each word occurs in a file",
    "returns the largest value of a list of numbers",
    "checks whether a number is a power of two",
    "removes duplicate lines and keeps their order",
    "converts a temperature from Celsius to Fahrenheit",
    "computes the average of a column in a CSV file",
    "finds the second smallest element of an array",
    "rotates a matrix by ninety degrees",
    "merges two lists of dates in order",
    "formats a number of seconds as hours, minutes and seconds",
    "validates an e-mail address in a simple way",
    "generates a random password of a given length",
    "sums the digits of an integer",
    "flattens a list of lists",
    "groups a list of people by their city",
    "finds all files larger than one megabyte in a directory",
    "computes the greatest common divisor of two numbers",
    "draws a triangle of stars of a given height",
    "transposes a table of strings",
    "implements a stack with push and pop",
    "searches a sorted array by bisection",
)

CODE_HELP = (
    "What does this code print, and why?\n\n{snippet}",
    "Find the bug in this code and fix it.\n\n{snippet}",
    "Explain this code line by line.\n\n{snippet}",
    "Rewrite this code so that it is easier to read.\n\n{snippet}",
)
SNIPPETS = (
    "```python\ntotal = 0\nfor i in range(1, 10):\n    total += i\nprint(total)\n```",
    "```python\ndef mean(xs):\n    return sum(xs) / len(xs)\nprint(mean([]))\n```",
    "```python\nnames = ['Ada', 'Bo', 'Cy']\nfor i, n in enumerate(names):\n    print(i * n)\n```",
    "```javascript\nlet a = [3, 20, 100];\na.sort();\nconsole.log(a);\n```",
    "```c\nint f(int n) {\n    if (n < 2) return n;\n    return f(n - 1) + f(n - 2);\n}\n```",
    "```python\ndef add(item, items=[]):\n    items.append(item)\n    return items\n```",
    "```bash\nfor f in *.txt; do\n    wc -l $f\ndone | sort -n\n```",
    "```python\nd = {}\nfor w in 'a b a c b a'.split():\n    d[w] = d.get(w, 0) + 1\nprint(d)\n```",
    "```java\nint i = 0;\nwhile (i < 5)\n    System.out.println(i);\n    i++;\n```",
    "```sql\nSELECT city, COUNT(*) FROM people WHERE age > 30 GROUP BY city;\n```",
)

MATHS_ASK = (
    "Show your steps.",
    "Think it through and give the final number at the end.",
    "Explain every calculation.",
)
MATHS = (
    "A gardener plants {a} rows of {b} tulips and {c} of them wither. How many are left?",
    "A train covers {hundred} kilometres in {a} hours. What is its average speed?",
    "Noor saves {b} euros a month and spends {c} of them. What does she have in {a} months?",
    "A rectangle is {b} metres long and {a} metres wide. What are its area and its perimeter?",
    "A printer makes {b} pages in {a} minutes. How long does it need for {hundred} pages?",
    "A shirt costs {b} dollars and is sold {a} percent cheaper. What is the new price?",
    "Three friends share {hundred} marbles in the ratio {a} to {c} to 1. How many does each get?",
    "A tank holds {hundred} litres and loses {half} litres a day. After how many days is it empty?",
    "Solve {c}x + {a} = {b} for x.",
    "What is the sum of all the whole numbers from {a} to {b}?",
    "A recipe for {a} people needs {hundred} grams of flour. How much is needed for {c} people?",
    "Out of {b} pupils, {a} play chess and {c} of these also sing. How many play chess only?",
)

REWRITE = (
    "Rewrite this sentence in a formal style: {sentence}",
    "Make this sentence shorter without losing its meaning: {sentence}",
    "Say this in a friendly and cheerful tone: {sentence}",
    "Give three different ways to say this: {sentence}",
    "Turn this into a short poem: {sentence}",
)
SENTENCES = (
    "The meeting was moved to Thursday because the room is being painted.",
    "Our neighbours have two dogs that bark whenever the post arrives.",
    "I forgot my umbrella and got completely wet on the way to work.",
    "The museum is closed on Mondays, but the garden stays open all week.",
    "We should check the numbers again before we send the report.",
    "She learned to sail when she was twelve and has never stopped since.",
    "The new bridge saves most people twenty minutes every morning.",
    "Nobody expected the small team to win the final match.",
    "Please return the books to the shelf on the left when you are finished.",
    "The old clock in the kitchen has been five minutes late for years.",
    "After the storm, the children collected branches in the park.",
    "My phone battery is almost empty, so I may not answer.",
    "The soup needs more salt, and the bread is still too hot to cut.",
    "They sold the house by the lake and moved to a smaller town.",
    "Good tools are expensive, but bad tools cost even more.",
)

LIST = (
    "List {number} {thing}.",
    "Name {number} {thing} and say one sentence about each.",
    "Give me {number} {thing} as a bulleted list, most important first.",
)
THINGS = (
    "ways to save water at home",
    "animals that live in the desert",
    "games for a long train journey",
    "habits of good writers",
    "inventions that changed medicine",
    "questions to ask a new colleague",
    "healthy snacks for children",
    "reasons to learn a second language",
    "famous rivers",
    "ideas for a school science project",
    "mistakes that beginners make when cooking",
    "things to check before renting a flat",
    "exercises that need no equipment",
    "uses for old newspapers",
    "tips for public speaking",
    "sorting algorithms",
    "musical instruments with strings",
    "measures against spam e-mail",
    "jobs that did not exist fifty years ago",
    "signs that a plant needs more light",
)

STORY = (
    "Write a very short story about {hero} who {event}.",
    "Begin a bedtime story in which {hero} {event}.",
    "Tell a funny story: {hero} {event}.",
)
HEROES = (
    "a lighthouse keeper",
    "a clever crow",
    "two sisters",
    "a retired astronaut",
    "a nervous dragon",
    "a night-shift baker",
    "a robot gardener",
    "a lost sailor",
    "a village teacher",
    "an honest thief",
)
EVENTS = (
    "finds a letter without an address",
    "has to cross the desert before winter",
    "discovers a door behind the bookshelf",
    "wins a contest by accident",
    "makes friends with the moon",
    "loses the only map of the island",
    "hears music that nobody else can hear",
    "repairs a clock that runs backwards",
)

EMAIL = (
    "Write a polite e-mail to {purpose}.",
    "Draft a short message to {purpose}. Keep it under one hundred words.",
    "Help me write an e-mail to {purpose}, with a subject line.",
)
PURPOSES = (
    "ask my landlord to repair the heating",
    "thank a colleague for help with a presentation",
    "cancel a gym membership",
    "invite the team to a summer picnic",
    "ask a professor for a letter of reference",
    "apologise to a customer for a late delivery",
    "decline a job offer kindly",
    "remind the choir about Friday's rehearsal",
    "request a refund for a broken lamp",
    "introduce myself to a new team",
    "ask a supplier for a lower price",
    "tell the parents about a school trip",
    "report a lost parcel",
    "propose a shorter weekly meeting",
    "congratulate a friend on a new job",
    "ask the library to extend a loan",
    "announce a change of office hours",
    "ask for feedback on a draft",
    "book a table for twelve people",
    "explain why a project needs two more weeks",
)

SUMMARY = (
    "Summarise this text in one sentence.\n\n{passage}",
    "Write a headline and a two-sentence summary for this text.\n\n{passage}",
    "What is the most important point of this text, and what follows from it?\n\n{passage}",
    "Summarise this text as three bullet points.\n\n{passage}",
)
EXTRACT = (
    "List all names, places and dates in this text.\n\n{passage}",
    "Return the facts of this text as a JSON object.\n\n{passage}",
    "Make a table of the numbers in this text and what they mean.\n\n{passage}",
    "Write three questions about this text, with their answers.\n\n{passage}",
)
PASSAGES = (
    "The town of Mirefield opened its new tram line on 4 May. The line has 11 stops and joins the "
    "harbour to the university. Mayor Ilse Brandt said that 9,000 people used it on the first day.",
    "Bees visit the orchard from April to June. In a warm spring each hive gathers about 20 "
    "kilograms of honey, but last year's frost cut the harvest by half. The farmer, Jon Okafor, "
    "now plants late-flowering clover.",
    "The Harlow Museum has bought a painting by Mina Castell for 120,000 pounds. It shows a fish "
    "market at dawn and was thought lost since 1931. Visitors can see it in room 6 from September.",
    "Our order of 40 chairs and 10 tables arrived on Tuesday in Lyon, but 3 chairs were damaged "
    "and one table is missing. The invoice of 2,450 euros has already been paid.",
    "Lake Serren has lost a third of its water since 1990. Scientists blame dry winters and new "
    "farms to the north. They ask the three villages on the shore to use less water in July.",
    "Dr Amara Singh tested a short daily walk with 64 office workers for 8 weeks. Those who walked "
    "slept 25 minutes longer on average and reported fewer headaches than the others.",
    "The night bus from Porto to Madrid leaves at 22:15 from gate 7 and arrives at 06:40. Each "
    "passenger may bring one suitcase of up to 20 kilograms. Tickets cost 38 euros.",
    "In 1887 Elena Rossi built a telescope in her father's barn. With it she found two comets and "
    "drew the first good map of the southern part of the Moon. She died in Turin in 1924.",
    "The library will be closed from 3 to 10 August while the roof is repaired. Books can be "
    "returned through the slot in Mill Street, and no fines will be charged in that week.",
    "A small bakery in Oslo began to sell yesterday's bread at half price. Within 6 months its "
    "waste fell from 30 loaves a day to 4, and 12 other bakeries copied the idea.",
    "The storm reached the coast on Sunday at noon. It closed the airport for 5 hours and left "
    "2,300 homes without power, but nobody was hurt. Repairs should be finished by Wednesday.",
    "Team Heron won the robot race in Kyoto with a machine that weighs only 900 grams. Its "
    "captain, Yuki Arai, is 16 and wrote the control program in three weekends.",
)

DIALOGUE = (
    "Write a short dialogue between {pair} about {subject}.",
    "Continue this conversation between {pair} who disagree about {subject}.",
)
PAIRS = (
    "a teacher and a student",
    "two old friends",
    "a doctor and a patient",
    "a customer and a shop assistant",
    "a grandmother and her grandson",
    "an engineer and an artist",
    "a cat and a dog",
)
SUBJECTS = (
    "the meaning of success",
    "a broken promise",
    "the weather tomorrow",
    "whether robots can be creative",
    "a missing umbrella",
    "the best way to learn history",
    "moving to another country",
    "a surprising phone bill",
    "how to spend a rainy Sunday",
)

TRANSLATE = ("Translate into {language}: {sentence}",)
TONGUES = ("French", "Spanish", "German", "Italian")

COMPARE = (
    "Compare {pair}. When would you choose which?",
    "What are the main differences between {pair}?",
    "Give one advantage and one disadvantage each of {pair}.",
)
COMPARED = (
    "trains and planes",
    "renting and buying a home",
    "tea and coffee",
    "Python and C++",
    "paper books and e-books",
    "working from home and working in an office",
    "solar and wind power",
    "a list and a dictionary",
    "running and swimming",
    "city life and country life",
    "mean and median",
    "credit cards and cash",
    "cats and dogs as pets",
    "novels and short stories",
    "gas and induction cookers",
    "compilers and interpreters",
    "oil paint and watercolour",
    "team sports and individual sports",
    "frogs and toads",
    "viruses and bacteria",
    "weather and climate",
    "bicycles and cars in a small town",
)

ADVICE = (
    "{problem} What should I do?",
    "{problem} Please give me honest advice.",
    "{problem} What would you say to a friend in this situation?",
)
PROBLEMS = (
    "I cannot fall asleep before two in the morning.",
    "My best friend forgot my birthday.",
    "I start many projects and finish none of them.",
    "My flatmate never washes the dishes.",
    "I am nervous about speaking in front of my class.",
    "I would like to change my career at forty.",
    "My dog is afraid of thunder.",
    "I spend too much time on my phone.",
    "My colleague takes the credit for my work.",
    "I want to read more books, but I am always tired in the evening.",
    "My houseplants keep dying.",
    "I have to choose between two universities.",
    "I was late three times this week.",
    "My parents do not understand why I want to study music.",
    "I moved to a new city and know nobody here.",
    "I have saved a little money for the first time.",
    "My son does not want to do his homework.",
    "I feel that my English is not getting any better.",
    "I promised to help two people at the same time.",
    "I always buy more food than I can eat.",
    "My team has a deadline that we cannot meet.",
    "I want to start running, but my knees hurt.",
    "I disagree with my manager about an important decision.",
    "I never know what to say in small talk.",
    "My old laptop is slow, and a new one is expensive.",
    "I would like to write a novel, but the first page frightens me.",
    "I said something unkind to my sister.",
)


if __name__ == "__main__":
    for row in split(sys.argv[1] if len(sys.argv) > 1 else "train"):
        print(json.dumps(row))
