"""Arithmetic word problems with worked answers: endless, varied, and fixed by a seed."""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

# One sentence's wordings stay on one line, so that a template reads as a table.
# ruff: noqa: E501

# Training draws other seeds, so a prompt of this seed has not been trained on.
HELD_OUT_SEED = 90_001

# fmt: off
NAMES = (
    "Anna Carla Elena Grace Ines Keiko Maria Olga Rosa Tina Wanda Zoe Lily Julia Janet Emma",
    "Ben David Farid Hugo Jamal Liam Noah Pedro Sam Victor Yusuf Mark Tom James Carlos Jack",
)
WORDS = {
    "items": "apples pens books shirts tickets candles mugs notebooks oranges plants toys cards stickers marbles cookies muffins roses lamps bracelets balloons posters cupcakes",
    "others": "pencils bananas erasers hats pears bags plates scarves lemons stamps magazines donuts keychains spoons ribbons",
    "place": "shop market store mall fair bakery bookstore supermarket",
    "job": "tutor cashier gardener painter driver waiter lifeguard mechanic",
    "animals": "dogs horses cows goats chickens rabbits sheep cats",
    "room": "library classroom office garage theater warehouse",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "vehicle": "train car bus bike truck boat",
    "dish": "soup pancakes lemonade bread pizza stew salad cookies",
}
OPENINGS = ("It is {day} today.", "{n} and {m} are neighbors.", "{n} lives near a {place}.", "{n} is a {job}.", "{n} likes to plan ahead.")
SPELLED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# fmt: on

# A range draws a whole number, a list one of its members, a text is computed from earlier ones.
Number = tuple[int, int] | list[int] | str
Wordings = tuple[str, ...]
Step = tuple[str, str, Wordings]


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of problem; a step names its result, its expression and its wordings."""

    numbers: dict[str, Number]
    story: tuple[Wordings, ...]
    question: Wordings
    steps: tuple[Step, ...]
    # What the last result counts, so that a follow-up can be added; empty for none.
    unit: str = ""


# fmt: off
TEMPLATES = (
    Template({"a": (2, 15), "p": (2, 12), "b": (2, 12), "q": (2, 9)},
        (("{n} buys {a} {items} for ${p} each at the {place}.", "At the {place}, {items} cost ${p} each and {n} picks {a} of them.", "{n} went to the {place} and bought {a} {items}. Each one cost ${p}."),
         ("{He} also buys {b} {others} that cost ${q} each.", "Then {he} adds {b} {others} at ${q} apiece.")),
        ("How much does {n} spend in total?", "What is the total cost, in dollars?", "How many dollars does {he} pay altogether?"),
        (("x", "{a}*{p}", ("The price of the {items} is ${c}.", "{n} spends ${c} on {items}.", "For the {items} {he} pays {c} dollars.")),
         ("y", "{b}*{q}", ("The {others} cost ${c}.", "{He} spends {c} dollars on {others}.")),
         ("z", "{x}+{y}", ("In total, {n} spends ${c}.", "The total is {c} dollars.", "So altogether {he} pays ${c}."))), "dollars"),
    Template({"a": (2, 9), "p": (2, 11), "bill": [20, 50, 100]},
        (("{n} has ${bill}.", "{n} takes a ${bill} bill to the {place}.", "{n}'s mother gave {n} ${bill}."),
         ("{He} buys {a} {items}, and each of them costs ${p}.", "{He} pays for {a} {items} at ${p} each.")),
        ("How much money does {he} have left?", "How much change does {n} get?", "How many dollars remain?"),
        (("x", "{a}*{p}", ("The {items} cost ${c}.", "{n} pays {c} dollars for the {items}.")),
         ("z", "{bill}-{x}", ("{He} has ${c} left.", "So {c} dollars remain.", "That leaves {n} with ${c}."))), "dollars"),
    Template({"a": (3, 40), "k": (2, 6)},
        (("{n} has {a} {items}.", "{n} collected {a} {items} last year.", "There are {a} {items} in {n}'s box."),
         ("{m} has {k} times as many {items} as {n}.", "{m} owns {k} times that number.")),
        ("How many {items} do they have together?", "How many {items} do {n} and {m} have in all?"),
        (("x", "{a}*{k}", ("{m} has {c} {items}.", "{m}'s share is {c} {items}.")),
         ("z", "{a}+{x}", ("Together they have {c} {items}.", "In all there are {c} {items}."))), "{items}"),
    Template({"f": [2, 3, 4, 5, 6], "b": (2, 15), "t": "f*b", "g": (1, 9)},
        (("{n} baked {t} {items}.", "There were {t} {items} on the table.", "{n} starts with {t} {items}."),
         ("1/{f} of them went to {m}.", "{n} gives one out of every {f} to {m}."), ("Then {g} more were lost.", "Later {he} gives {g} to a neighbor.")),
        ("How many {items} are left?", "How many {items} does {n} still have?"),
        (("x", "{t}/{f}", ("{m} gets {c} {items}.", "The part that went to {m} is {c} {items}.")),
         ("y", "{t}-{x}", ("After that {n} has {c} {items}.", "This leaves {c} {items}.")),
         ("z", "{y}-{g}", ("In the end {c} {items} are left.", "So there are {c} {items} left."))), "{items}"),
    Template({"w": (8, 25), "h": (3, 9), "d": (2, 6), "s": (5, 60)},
        (("{n} works as a {job} and earns ${w} an hour.", "{n}'s job as a {job} pays ${w} per hour."),
         ("{He} works {h} hours a day, {d} days a week.", "Every week {he} works {d} days of {h} hours each."), ("{He} spends ${s} a week on travel.", "Each week {he} pays ${s} for lunch.")),
        ("How much does {n} have left after a week?", "How many dollars does {he} keep each week?"),
        (("x", "{h}*{d}", ("{n} works {c} hours per week.", "In a week {he} works {c} hours.")),
         ("y", "{x}*{w}", ("{He} earns ${c}.", "That pays {c} dollars.")),
         ("z", "{y}-{s}", ("{He} keeps ${c}.", "After costs {n} has {c} dollars left."))), "dollars"),
    Template({"v1": (20, 70), "t": (2, 6), "u": (20, 70), "r": (2, 5)},
        (("A {vehicle} travels at {v1} miles per hour for {t} hours.", "{n} drives for {t} hours at {v1} mph."),
         ("Then it goes on for {r} hours at {u} miles per hour.", "After a break, the trip continues at {u} mph for another {r} hours.")),
        ("What is the total distance in miles?", "How many miles is the whole trip?"),
        (("x", "{v1}*{t}", ("The first part is {c} miles.", "In the first {t} hours the distance is {c} miles.")),
         ("y", "{u}*{r}", ("The second part is {c} miles.", "Then another {c} miles follow.")),
         ("z", "{x}+{y}", ("The whole trip is {c} miles.", "Altogether that is {c} miles."))),),
    Template({"a": (5, 30), "k": (2, 4), "y": (2, 12)},
        (("{n} is {a} years old.", "{n} turned {a} today."), ("{m} is {k} times as old as {n}.", "{n}'s uncle {m} is {k} times {his} age.")),
        ("How old will {m} be in {y} years?", "What will be {m}'s age {y} years from now?"),
        (("x", "{a}*{k}", ("{m} is {c} years old now.", "Today {m} is {c}.")),
         ("z", "{x}+{y}", ("In {y} years {m} will be {c} years old.", "{y} years later the age is {c}."))),),
    Template({"k": (2, 8), "b": (2, 12), "t": "k*b", "e": (1, 6)},
        (("{n} has {t} {items} and shares them equally among {k} friends.", "{k} friends split {t} {items} evenly."),
         ("One of them, {m}, already had {e} {items}.", "{m}, who is one of the friends, had {e} before.")),
        ("How many {items} does {m} have now?", "How many {items} does {m} end up with?"),
        (("x", "{t}/{k}", ("Each friend gets {c} {items}.", "The share of each is {c} {items}.")),
         ("z", "{x}+{e}", ("{m} now has {c} {items}.", "So {m} ends up with {c} {items}."))), "{items}"),
    Template({"p": [20, 40, 50, 60, 80, 100, 120, 150, 200], "d": [5, 10, 15, 20, 25, 30, 40, 50], "a": (2, 5)},
        (("A jacket costs ${p}.", "The price of a chair at the {place} is ${p}.", "{n} wants a coat with a price of ${p}."),
         ("There is a {d}% discount today.", "On {day} everything is {d}% off."), ("{n} buys {a} of them.", "{a} of them are bought by {n}.")),
        ("How much does {n} pay?", "What is the total price after the discount?"),
        (("x", "{p}*{d}/100", ("The discount is ${c}.", "{d}% of the price is {c} dollars.")),
         ("y", "{p}-{x}", ("Each one costs ${c} after the discount.", "The new price is {c} dollars.")),
         ("z", "{a}*{y}", ("{n} pays ${c}.", "For {a} of them the price is {c} dollars."))), "dollars"),
    Template({"t": [20, 40, 50, 60, 80, 100, 120, 200, 300], "d": [10, 20, 25, 30, 40, 50, 60, 75]},
        (("There are {t} people in the {room}.", "A school has {t} students.", "{t} guests came to {n}'s party."),
         ("{d}% of them are adults.", "{d} percent of them wear glasses.", "{d}% of them came by {vehicle}.")),
        ("How many of them are not in that group?", "How many people make up the rest?"),
        (("x", "{t}*{d}/100", ("{d}% of {t} is {c}.", "The first group has {c} people.")),
         ("z", "{t}-{x}", ("The rest are {c} people.", "So {c} of them are not in the group."))),),
    Template({"w": (5, 25), "k": (3, 12), "p": "w*k", "h": (5, 40), "t": "p+h"},
        (("{n} wants to buy a game that costs ${t}.", "{n} is saving for a bicycle with a price of ${t}."),
         ("{He} already has ${h} and saves ${w} each week.", "So far {he} saved ${h}, and {he} puts aside ${w} every week.")),
        ("How many weeks must {he} save?", "After how many weeks can {n} buy it?"),
        (("x", "{t}-{h}", ("{He} still needs ${c}.", "{n} is missing {c} dollars.")),
         ("z", "{x}/{w}", ("{He} needs {c} weeks.", "So it takes {c} weeks of saving."))),),
    Template({"b": (3, 12), "a": (4, 24), "p": (2, 9), "s": (1, 10)},
        (("A farmer has {b} boxes with {a} {items} in each.", "{n} packs {a} {items} into each of {b} boxes."),
         ("{s} of the {items} are broken and cannot be sold.", "Before selling, {n} throws away {s} bad ones."), ("The rest are sold for ${p} each.", "{He} sells the others at ${p} each.")),
        ("How much money does {n} make?", "How many dollars does the sale bring?"),
        (("x", "{b}*{a}", ("There are {c} {items} in the boxes.", "In total there are {c} {items}.")),
         ("y", "{x}-{s}", ("{c} can be sold.", "{n} sells {c} {items}.")),
         ("z", "{y}*{p}", ("{He} makes ${c}.", "The sale brings {c} dollars."))), "dollars"),
    Template({"h": (6, 60), "a": "h*2"},
        (("{n} sold {a} {items} in April.", "On {day} {n} made {a} {items}."), ("The next time it was half as many.", "In the following month {he} managed half that number.")),
        ("How many {items} is that altogether?", "How many {items} were there in total?"),
        (("x", "{a}/2", ("The second time it was {c} {items}.", "Half as many is {c} {items}.")),
         ("z", "{a}+{x}", ("Altogether that is {c} {items}.", "The total is {c} {items}."))), "{items}"),
    Template({"e": (10, 40), "u": (2, 5), "g": (1, 4), "p": (2, 5), "d": [5, 7, 10]},
        (("{n}'s {animals} give {e} liters of milk per day.", "{n} collects {e} eggs every day."),
         ("{He} uses {u} at home and gives {g} to {m}.", "{u} are used for breakfast and {g} for baking."), ("The rest is sold at ${p} each.", "{He} sells what remains for ${p} each.")),
        ("How many dollars does {n} make in {d} days?", "How much does {he} earn in {d} days?"),
        (("x", "{e}-{u}-{g}", ("{n} sells {c} a day.", "{c} are left to sell every day.")),
         ("y", "{x}*{p}", ("{He} makes ${c} a day.", "That brings {c} dollars per day.")),
         ("z", "{y}*{d}", ("In {d} days {he} makes ${c}.", "After {d} days it is {c} dollars."))), "dollars"),
    Template({"r": (8, 30), "d": (2, 7), "k": (2, 9), "l": (5, 30), "t": "r*d+l*k"},
        (("{n} is reading a book of {t} pages.", "A book has {t} pages and {n} wants to read all of it."),
         ("For {d} days {he} reads {r} pages a day.", "{He} read {r} pages on each of the first {d} days.")),
        ("If {he} wants to finish in {k} more days, how many pages must {he} read per day?", "How many pages a day remain if {k} days are left?"),
        (("x", "{r}*{d}", ("{n} has read {c} pages.", "So far that is {c} pages.")),
         ("y", "{t}-{x}", ("{c} pages are left.", "{He} still has to read {c} pages.")),
         ("z", "{y}/{k}", ("{He} must read {c} pages a day.", "That makes {c} pages per day."))),),
    Template({"m1": (30, 90), "k": (2, 6), "s": (5, 25), "d": (2, 7)},
        (("It takes {n} {m1} minutes to paint a chair.", "Washing a {vehicle} takes {n} {m1} minutes."),
         ("{m} needs {s} minutes less.", "{m} is faster by {s} minutes.")),
        ("How many minutes does {m} need for {k} of them?", "How long, in minutes, does {m} take to do {k}?"),
        (("x", "{m1}-{s}", ("{m} needs {c} minutes for one.", "One takes {m} {c} minutes.")),
         ("z", "{x}*{k}", ("For {k} of them {m} needs {c} minutes.", "All {k} take {c} minutes."))),),
    Template({"k": (2, 6), "c1": (2, 5), "s": (2, 8), "t": "s*k", "e": (1, 4)},
        (("A recipe for {dish} needs {c1} cups of flour for {s} people.", "To make {dish} for {s} people, {n} uses {c1} cups of milk."),
         ("{n} cooks for {t} people.", "{t} people are coming to dinner."), ("{He} spills {e} cups and must replace them.", "{e} extra cups are needed for the sauce.")),
        ("How many cups does {n} need?", "How many cups are used in total?"),
        (("x", "{t}/{s}", ("{He} makes {c} times the recipe.", "The recipe is needed {c} times.")),
         ("y", "{x}*{c1}", ("That takes {c} cups.", "For this {he} uses {c} cups.")),
         ("z", "{y}+{e}", ("In total {n} needs {c} cups.", "With the rest it is {c} cups."))),),
    Template({"a": (20, 60), "o": (3, 15), "i": (2, 12)},
        (("There are {a} people on a bus.", "A train leaves with {a} passengers.", "{a} children play in the park."),
         ("At the first stop {o} leave and {i} come in.", "Then {o} go home and {i} new ones arrive."), ("Later half of the people leave.", "After an hour half of them go.")),
        ("How many people are left?", "How many remain?"),
        (("x", "{a}-{o}", ("After {o} leave there are {c} people.", "{c} people stay.")),
         ("y", "{x}+{i}", ("With the new ones there are {c}.", "Then there are {c} people.")),
         ("z", "{y}/2", ("{c} people are left.", "Half of them is {c} people."))),),
    Template({"l": (5, 40), "w": (3, 25), "p": (2, 12)},
        (("A garden is {l} meters long and {w} meters wide.", "{n}'s yard measures {l} feet by {w} feet."), ("A fence costs ${p} per unit of length.", "{n} wants a fence around it at ${p} for each unit of length.")),
        ("How much does a fence around it cost?", "What does {n} pay for the fence?"),
        (("x", "{l}+{w}", ("Two sides together are {c}.", "Length plus width is {c}.")),
         ("y", "{x}*2", ("All the way around is {c}.", "The perimeter is {c}.")),
         ("z", "{y}*{p}", ("The fence costs ${c}.", "{n} pays {c} dollars."))), "dollars"),
    Template({"a": (5, 30), "b": (5, 30), "c3": (5, 30)},
        (("{n} scored {a} points in the first game.", "In the first test {n} got {a} points."), ("{He} scored {b} in the second and {c3} in the third.", "The next two results were {b} and {c3} points.")),
        ("What is the average?", "What is {n}'s average score?"),
        (("x", "{a}+{b}+{c3}", ("The sum is {c} points.", "{n} has {c} points in total.")),
         ("z", "{x}/3", ("The average is {c} points.", "So on average it is {c}."))),),
    Template({"p": (20, 90), "t": [10, 20, 25, 50], "k": (2, 5)},
        (("{n} and friends have dinner for ${p}.", "The bill at a restaurant is ${p}."), ("They add a {t}% tip.", "A tip of {t} percent is added."), ("The {k} people share the cost equally.", "It is split between {k} people.")),
        ("How much does each person pay?", "What is the share of each, in dollars?"),
        (("x", "{p}*{t}/100", ("The tip is ${c}.", "The tip comes to {c} dollars.")),
         ("y", "{p}+{x}", ("Together that is ${c}.", "With the tip the bill is {c} dollars.")),
         ("z", "{y}/{k}", ("Each person pays ${c}.", "Everyone pays {c} dollars."))), "dollars"),
    Template({"a": (3, 9), "f": (1, 4), "d": [7, 10, 14, 30], "s": (2, 6)},
        (("{n} has {a} {animals}.", "On a farm there are {a} {animals}."), ("Each of them eats {f} pounds of food per day.", "Every one needs {f} kilograms of food a day."), ("A bag of food holds {s} of these and costs $1 for each.", "Food is sold in bags of {s}.")),
        ("How many bags are needed for {d} days?", "How many bags does {n} need in {d} days?"),
        (("x", "{a}*{f}", ("They eat {c} per day.", "The {animals} need {c} a day.")),
         ("y", "{x}*{d}", ("In {d} days they eat {c}.", "For {d} days that is {c}.")),
         ("z", "{y}/{s}", ("{n} needs {c} bags.", "That makes {c} bags."))),),
)
# A follow-up: an extra sentence, a new question, then two more steps as expression and wordings.
TWISTS = (
    ("{m} has {k2} times that amount.", "How many {unit} do {n} and {m} have together?", "{z}*{k2}", ("{m} has {c} {unit}.", "{k2} times as many is {c} {unit}."), "{z}+{v}", ("Together they have {c} {unit}.", "That makes {c} {unit} in all.")),
    ("{m} has {k2} fewer than that.", "How many {unit} do they have together?", "{z}-{k2}", ("{m} has {c} {unit}.", "{k2} fewer is {c} {unit}."), "{z}+{v}", ("Together that is {c} {unit}.", "In all they have {c} {unit}.")),
    ("The same happens {k2} weeks in a row, and then {k3} {unit} are given away.", "How many {unit} are there in the end?", "{z}*{k2}", ("In {k2} weeks it is {c} {unit}.", "After {k2} weeks there are {c} {unit}."), "{v}-{k3}", ("In the end there are {c} {unit}.", "So {c} {unit} stay.")),
)
# fmt: on

# fmt: off
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}
# fmt: on


def evaluate(expression: str) -> Fraction:
    """Return the exact value of numbers and + - * /; ValueError for anything else."""
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(repr(node.value))
    raise ValueError(f"an expression has numbers and + - * / only, got {ast.unparse(node)}")


def word_problems(seed: int) -> Iterator[tuple[str, str]]:
    """Yield problems without end as (problem, newline + worked answer + "#### result")."""
    rng = random.Random(seed)
    while True:
        if drawn := _draw_problem(rng):
            yield drawn


def demo_prompts(count: int, seed: int = HELD_OUT_SEED) -> list[str]:
    """Return `count` different problem texts of one seed."""
    prompts: dict[str, None] = {}
    problems = word_problems(seed)
    while len(prompts) < count:
        prompts[next(problems)[0]] = None
    return list(prompts)


def _draw_problem(rng: random.Random) -> tuple[str, str] | None:
    """Draw one problem; None when a number in it would not be plain and positive."""
    template = rng.choice(TEMPLATES)
    context = _draw_context(rng, template)
    story = [rng.choice(sentence) for sentence in template.story]
    question, steps = rng.choice(template.question), list(template.steps)
    if template.unit and rng.random() < 0.35:
        extra, question, first, first_words, second, second_words = rng.choice(TWISTS)
        context["unit"] = template.unit.format(**context)
        story.append(extra)
        steps += [("v", first, first_words), ("z", second, second_words)]
    if rng.random() < 0.15:
        story.insert(0, rng.choice(OPENINGS))
    problem = " ".join([*story, question]).format(**context)
    answer = _work_out(rng, steps, context)
    if answer is None:
        return None
    if rng.random() < 0.3:
        problem = re.sub(r"(?<=[a-z,] )[2-9](?= [a-z])", lambda m: SPELLED[int(m[0])], problem)
    return problem, answer


def _draw_context(rng: random.Random, template: Template) -> dict[str, str]:
    """Draw the names, the words and the numbers that a template's sentences mention."""
    names, he, his = rng.choice(((NAMES[0], "she", "her"), (NAMES[1], "he", "his")))
    name = rng.choice(names.split())
    other = rng.choice([n for n in " ".join(NAMES).split() if n != name])
    context = {key: rng.choice(text.split()) for key, text in WORDS.items()}
    context |= {"n": name, "m": other, "he": he, "He": he.capitalize(), "his": his}
    numbers: dict[str, int] = {}
    for key, spec in {**template.numbers, "k2": (2, 4), "k3": (2, 9)}.items():
        if isinstance(spec, str):
            numbers[key] = int(evaluate(re.sub(r"[a-z]\w*", lambda m: str(numbers[m[0]]), spec)))
        else:
            numbers[key] = rng.randint(*spec) if isinstance(spec, tuple) else rng.choice(spec)
    return context | {key: str(number) for key, number in numbers.items()}


def _work_out(rng: random.Random, steps: list[Step], context: dict[str, str]) -> str | None:
    """Return the worked answer, or None when a result is not positive or has many decimals."""
    spaced = rng.random() < 0.6
    lines, shown = [], ""
    for key, formula, wordings in steps:
        expression = formula.format(**context)
        value = evaluate(expression)
        if value <= 0 or (value * 100).denominator != 1:
            return None
        if value.denominator != 1 and not any("$" in text for text in wordings):
            return None
        shown = f"{float(value):g}" if value.denominator != 1 else str(value.numerator)
        if evaluate(shown) != value:
            return None
        left = re.sub(r"([-+*/])", r" \1 ", expression) + " " if spaced else expression
        calculation = f"{left}={' ' if spaced else ''}<<{expression}={shown}>>{shown}"
        lines.append(rng.choice(wordings).format(**context, c=calculation))
        context[key] = shown
    return "\n" + "\n".join(lines) + f"\n#### {shown}"
