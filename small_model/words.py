"""The words that documents are made of."""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: Final = _words(
    "amber ancient autumn bitter black blue bold brass brave bright broad broken bronze calm clear "
    "clever cold copper coral crimson crooked curious dark deep distant double dry dusty early "
    "eastern empty faded famous fast final first flat foreign frozen gentle giant glass golden "
    "grand gray green hidden high hollow honest humble idle inner iron ivory jade jolly large late "
    "leaden lonely long loud lower lucky marble merry misty modern narrow noble northern odd old "
    "olive open outer pale patient plain polite proud purple quick quiet rapid rare red rough "
    "round royal rustic salty scarlet secret sharp short silent silver simple slow small smooth "
    "solid southern square steady steep stone strange strong sunny sweet tall tender thin tiny "
    "upper vacant velvet violet warm weary western white wide wild windy winter wise wooden yellow "
    "young"
)
NOUNS: Final = _words(
    "anchor apple arch arrow badge bakery barn basket beacon bell bench bicycle blanket boat "
    "bottle bridge bucket button cabin cable camera candle canoe canyon carpet castle cedar chapel "
    "chimney circle clock cloud coast comet compass cottage crane creek curtain desert diamond "
    "dock dragon drum eagle easel engine falcon farm feather ferry fiddle field flame flute "
    "forest fountain fox garden gate glacier glove hammer harbor harp hawk helmet hill horizon "
    "hotel island jacket jungle kettle key kitchen kite ladder lagoon lake lamp lantern lemon "
    "lighthouse lily lion maple market meadow medal mill mirror monument moon mountain museum "
    "needle nest oak ocean orchard otter owl palace panther paper parrot path pearl pencil piano "
    "pigeon pillow pine planet plaza pocket pond prairie prism quarry rabbit raven reef ribbon "
    "ridge river robin rocket saddle sail sandal school shadow shell ship spoon spring stable star "
    "station statue summit swan table tavern temple theater thunder tiger tower train tulip "
    "tunnel turtle valley vase village violin wagon walnut waterfall wheel whistle willow window "
    "wolf yard"
)
NAMES: Final = _words(
    "Ada Alma Anton Arne Bela Boris Carla Cato Clara Dario Dora Edgar Elin Emil Erik Esra Felix "
    "Fiona Frida Gita Greta Hanna Hugo Ida Igor Ines Ivan Jana Jonas Kira Lars Lena Leo Lidia "
    "Luca Mara Marta Milo Mira Nadia Nils Nora Olga Oscar Otto Paula Petra Quinn Rosa Ruben Sara "
    "Silas Sofia Tara Theo Tilda Ulla Vera Viktor Wanda Xenia Yara Yuri Zora"
)
MONTHS: Final = _words(
    "January February March April May June July August September October November December"
)

# {name}, {adjective}, {noun}, {month} and {small}, a number below 100, are drawn for each sentence.
FILLER: Final = (
    "{name} walked past the {adjective} {noun} and did not stop.",
    "In {month} the {noun} was painted by {name} and two friends.",
    "Nobody remembers who built the {adjective} {noun} near the {noun}.",
    "It rained for {small} days, and the {noun} stayed shut.",
    "{name} and {name} talked about the {noun} until late in the evening.",
    "The road behind the {noun} leads to a {adjective} {noun}.",
    "Every morning {name} brings fresh bread to the {adjective} {noun}.",
    "The meeting in {month} took {small} minutes longer than planned.",
    "A {adjective} {noun} stood between the trees, as it always had.",
    "{name} wrote a letter about the {noun}, but never sent it.",
    "There were {small} visitors at the {noun} last {month}.",
    "The wind turned, and the {noun} looked {adjective} in the light.",
    "Most people take the path along the {noun} when it is warm.",
    "{name} sold the {adjective} {noun} and bought a {noun} instead.",
    "Children from the village play around the {noun} after school.",
    "The old map shows a {noun} where the {adjective} {noun} is now.",
    "After lunch {name} repaired the {noun} with a piece of wire.",
    "The newspaper said little about the {noun} in {month}.",
    "On the way home {name} counted {small} birds above the {noun}.",
    "Some say that the {noun} is {adjective}, others do not care.",
    "The music from the {noun} could be heard across the water.",
    "{name} keeps a {adjective} {noun} on the shelf by the door.",
    "When the bus came, {name} was still looking for the {noun}.",
    "The {noun} closes early in {month}, because the days are short.",
)
