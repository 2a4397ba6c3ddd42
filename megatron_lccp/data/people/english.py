"""English words and sentences about the invented people and places; `names_zh` is the Chinese counterpart.

In: nothing. Out: tuples of words, made up or common knowledge, and sentences of our own. `facts` puts them together.
A family name is a LAST_START + LAST_END, a first and a middle name come from FIRST and MIDDLE: 146 x 105 x 1062 names,
so that remembering a name is of no use and only looking it up is.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


FIRST = _words(
    """
    Abel, Ada, Adele, Agnes, Aiko, Alba, Albert, Alina, Amara, Amir, Anders, Anika, Anton, Arlo, Asha, Astrid, Aurel,
    Bela, Berta, Bianca, Bjorn, Boris, Bruno, Camila, Carla, Cedric, Celia, Chidi, Clara, Cosmo, Dalia, Dario, Delia,
    Dmitri, Dora, Edda, Edgar, Elena, Elif, Elio, Emil, Enzo, Erika, Esme, Ewan, Fadil, Farah, Felix, Fiona, Flora,
    Franz, Frida, Gavin, Gemma, Giles, Greta, Gustav, Hana, Hari, Hector, Heidi, Hiro, Hugo, Ibrahim, Ida, Igor, Imani,
    Ines, Ingrid, Irina, Isaac, Ivo, Jada, Jasper, Joana, Jonas, Juno, Kaito, Karim, Katya, Kenji, Kira, Klaus, Lara,
    Lars, Leila, Lena, Leon, Linus, Lorna, Luca, Lucia, Magnus, Maia, Malik, Marta, Matteo, Milan, Mina, Miriam, Nadia,
    Nikolai, Nina, Noor, Odile, Olaf, Olga, Omar, Otto, Paloma, Pavel, Petra, Priya, Quentin, Rafael, Ravi, Rhea, Rosa,
    Rufus, Sadie, Samir, Selma, Silas, Simone, Sofia, Soren, Stella, Sven, Tamar, Tariq, Tessa, Theo, Thora, Tilda,
    Tomas, Uma, Ursula, Vera, Victor, Wanda, Wilma, Xenia, Yara, Yusuf, Zelda, Zora
    """
)

MIDDLE = _words(
    """
    Alder, Amber, April, Ash, August, Autumn, Basil, Bay, Birch, Blaze, Bloom, Briar, Brook, Cedar, Clay, Clover, Coral,
    Crane, Cyan, Dale, Dawn, Dell, Dove, Drew, Dune, Ebony, Echo, Elm, Ember, Fable, Fern, Finch, Flint, Forrest, Frost,
    Gale, Garnet, Glen, Grove, Hale, Harbor, Haven, Hawk, Hazel, Heath, Heron, Indigo, Iris, Ivory, Ivy, Jade, Jay, Jet,
    June, Juniper, Lake, Lane, Lark, Laurel, Leaf, Lily, Linden, Lotus, Lynx, March, Marina, May, Meadow, Merle, Moss,
    Myrtle, North, Oak, Ocean, Olive, Onyx, Opal, Orion, Pearl, Pike, Pine, Poppy, Quill, Rain, Raven, Reed, Ridge,
    River, Robin, Rowan, Rue, Sage, Sky, Slate, Sorrel, Star, Stone, Storm, Teal, Thorn, Vale, Violet, Willow, Winter,
    Wren
    """
)

LAST_START = _words(
    """
    Alm, Amber, Arden, Ash, Bal, Bark, Bell, Bram, Brin, Cal, Car, Castle, Cold, Corn, Dal, Dray, Dun, Elder, Fair, Fal,
    Fen, Gar, Gold, Gran, Hal, Hart, Hol, Karl, Kings, Lang, Lind, Lock, Mal, Mar, Mill, Nor, Oak, Pem, Pen, Quar, Red,
    Ros, Sand, Sel, Sheld, Stan, Sund, Tar, Thorn, Tol, Val, Wald, War, West, Whit, Win, Wood, Yar, Zand
    """
)

LAST_END = _words(
    """
    berg, bridge, bury, by, cott, croft, dale, den, field, ford, gate, ham, holm, hurst, ley, man, mark, stead
    """
)

CITIES = _words(
    """
    Accra, Adelaide, Ankara, Antwerp, Athens, Auckland, Bamako, Bangkok, Barcelona, Belgrade, Bergen, Bern, Bilbao,
    Bogota, Bologna, Bordeaux, Bratislava, Brisbane, Bristol, Brno, Bucharest, Budapest, Cairo, Calgary, Cardiff,
    Casablanca, Chennai, Cologne, Colombo, Copenhagen, Cork, Cusco, Dakar, Denver, Dhaka, Dublin, Durban, Edinburgh,
    Fukuoka, Gdansk, Geneva, Genoa, Ghent, Glasgow, Granada, Graz, Hamburg, Hanoi, Havana, Helsinki, Istanbul, Jakarta,
    Kampala, Kigali, Krakow, Kyoto, La Paz, Lagos, Leipzig, Lima, Lisbon, Ljubljana, Luanda, Lusaka, Lyon, Malmo,
    Manila, Maputo, Marseille, Medellin, Melbourne, Milan, Minsk, Montreal, Mumbai, Nairobi, Naples, Nantes, Oslo,
    Ottawa, Palermo, Perth, Porto, Prague, Quito, Reykjavik, Riga, Rosario, Rotterdam, Salvador, Santiago, Sapporo,
    Seoul, Seville, Sofia, Split, Stockholm, Taipei, Tallinn, Tampere, Tbilisi, Tirana, Toronto, Trieste, Tunis, Turin,
    Utrecht, Valencia, Vancouver, Vienna, Vilnius, Warsaw, Yerevan, Zagreb, Zurich
    """
)

HOBBIES = _words(
    """
    archery, astronomy, badminton, baking bread, ballroom dancing, beekeeping, bird watching, bookbinding, bouldering,
    brewing cider, building model ships, calligraphy, canoeing, carving spoons, chess, collecting maps, collecting
    stamps, cross-country skiing, curling, diving, embroidery, falconry, fencing, fishing, flying kites, folk singing,
    gardening, geocaching, glass blowing, growing orchids, horse riding, ice skating, jigsaw puzzles, juggling, karate,
    keeping bonsai trees, knitting, long-distance swimming, making candles, making cheese, marbling paper, mountain
    hiking, mushroom picking, night photography, origami, painting portraits, playing the accordion, playing the cello,
    playing the harp, pottery, quilting, radio building, restoring clocks, rowing, running marathons, sailing,
    scrapbooking, shadow puppetry, soap making, stargazing, street photography, surfing, table tennis, tango,
    unicycling, watercolour painting, weaving baskets, whittling, wood turning, writing haiku, yoga
    """
)

FIELDS = _words(
    """
    acoustics, agronomy, ancient history, animal science, anthropology, applied mathematics, archaeology, architecture,
    astrophysics, botany, cartography, ceramics, civil engineering, classics, climatology, cognitive science,
    computational linguistics, criminology, dentistry, economics, electrical engineering, entomology, ethics, fashion
    design, film studies, food chemistry, forestry, genetics, geodesy, geology, graphic design, hydrology, immunology,
    industrial design, international law, journalism, landscape design, library science, logic, marine biology,
    materials science, mechanical engineering, medicine, metallurgy, meteorology, microbiology, music theory,
    neuroscience, nursing, oceanography, optics, palaeontology, pharmacy, philosophy, phonetics, political science,
    psychology, public health, robotics, social work, sociology, soil science, statistics, theatre studies, urban
    planning, veterinary medicine, viticulture, zoology
    """
)

JOBS = _words(
    """
    accountant, acrobat, actuary, air traffic controller, anaesthetist, archivist, auctioneer, baker, barber, bicycle
    mechanic, blacksmith, bookseller, brewer, bricklayer, bus driver, carpenter, chemist, choir leader, clockmaker,
    coastguard, conductor, cook, court clerk, crane operator, dairy farmer, diplomat, editor, electrician, ferry
    captain, firefighter, florist, forester, gardener, glazier, goldsmith, harbour pilot, interpreter, judge, lighthouse
    keeper, locksmith, mason, midwife, miller, miner, museum guide, notary, nurse, optician, organist, park ranger,
    pastry chef, photographer, physiotherapist, piano tuner, plumber, potter, printer, radio presenter, roofer,
    sailmaker, school teacher, seamstress, shepherd, shoemaker, sound engineer, stonecutter, surveyor, tailor, tax
    adviser, train driver, translator, upholsterer, vet, violin maker, watchmaker, weaver, welder, zookeeper
    """
)

SCHOOLS = _words(
    """
    College, University, Institute of Technology, Academy of Arts, Polytechnic, School of Science
    """
)

MONTHS = _words(
    """
    January, February, March, April, May, June, July, August, September, October, November, December
    """
)

COLOURS = _words(
    """
    amber, apricot, azure, bronze, burgundy, charcoal, cobalt, copper, coral, cream, crimson, emerald, fuchsia, golden,
    indigo, ivory, lavender, lilac, maroon, mint, mustard, navy, ochre, olive, orange, pearl, pink, plum, ruby, rust,
    saffron, salmon, scarlet, silver, teal, turquoise
    """
)

THINGS = _words(
    """
    anchor, anvil, arrow, barrel, basket, bell, bench, blanket, bottle, bucket, button, candle, carpet, chimney,
    compass, cradle, crown, drum, feather, fiddle, hammer, harness, kettle, ladder, lantern, mirror, needle, oar,
    paddle, pillow, ribbon, saddle, shovel, spoon, teapot, thimble, trumpet, umbrella, wagon, whistle
    """
)

SPICES = _words(
    """
    allspice, anise, bay leaf, black garlic, caraway, cardamom, cinnamon, cloves, cumin, dill, fennel seed, ginger,
    horseradish, juniper, lemon peel, lovage, mace, marjoram, nutmeg, orange zest, paprika, rosemary, saffron, sorrel,
    star anise, sumac, tarragon, thyme
    """
)

PASTIMES = _words(
    """
    learn bookbinding from a retired printer, taste plum jam in the covered market, copy old maps in the city archive,
    listen to the organ in the empty cathedral, ride the yellow tram to its last stop, feed the carp in the palm house,
    play dominoes with the ferrymen, sort buttons in the tailor's back room, draw the stuffed whale in the museum, drink
    cocoa above the clock tower, read ghost stories in the tea house, build paper boats under the arcades, watch the
    glass blowers at work, repair umbrellas with the old tinsmith, steam dumplings at the corner kitchen, study the
    mosaics in the bath house, polish brass in the harbour office, bake almond cakes with the nuns
    """
)

# What a name is put together from, and how.
NAME_PARTS = (FIRST, MIDDLE, LAST_START, LAST_END)
NAME = "{} {} {}{}"

# What {slots} of VALUES are drawn from.
LISTS: dict[str, tuple[str, ...]] = {
    "hobby": HOBBIES,
    "city": CITIES,
    "field": FIELDS,
    "job": JOBS,
    "school_start": LAST_START,
    "school_end": LAST_END,
    "school_kind": SCHOOLS,
    "day": tuple(map(str, range(1, 29))),
    "month": MONTHS,
    "year": tuple(map(str, range(1930, 2006))),
    "colour": COLOURS,
    "thing": THINGS,
    "spice": SPICES,
    "pastime": PASTIMES,
    "hour": tuple(map(str, range(13, 24))),
    "minute": tuple(map(str, range(10, 60))),
    "steps": tuple(map(str, range(101, 990))),
}

# Attribute of a person or kind of a single fact -> its value; {person} is a needle's name.
VALUES = {
    "hobby": "{hobby}",
    "birthday": "{day} {month} {year}",
    "birthplace": "{city}",
    "school": "{school_start}{school_end} {school_kind}",
    "field": "{field}",
    "job": "{job}",
    "work_city": "{city}",
    "afternoon": "{pastime}",
    "password": "{colour} {thing}",
    "soup": "{spice} with a little {spice}",
    "ferry": "{hour}:{minute}",
    "key": "{colour} {thing}",
    "door": "{colour} and {colour}",
    "steps": "{steps}",
    "founder": "{person}",
}

QUESTION = "\nQuestion: {question}\nAnswer:"
NO_QUESTION = "N/A"
# Stands between sentences, and before an answer.
SPACE = " "
OPENING = "A few words about {name}."

# Attribute -> the standard sentence and the question.
STANDARD = {
    attribute: (f"The {subject} is {{value}}.", f"What is the {subject}?")
    for attribute, subject in {
        "hobby": "hobby of {name}",
        "birthday": "date of birth of {name}",
        "birthplace": "birthplace of {name}",
        "school": "school that {name} attended",
        "field": "field that {name} studied",
        "job": "occupation of {name}",
        "work_city": "city where {name} works",
    }.items()
}

# Attribute -> other sentences that say the same. A slot stands between spaces or before a full stop or comma.
PARAPHRASE = {
    "hobby": (
        "Whenever there is time, {name} turns to {value}.",
        "Nothing pleases {name} more than {value}.",
        "Most weekends of {name} are given over to {value}.",
        "For {name}, leisure means {value}.",
        "Ask {name} about evenings at home and the talk soon turns to {value}.",
        "After work {name} thinks of little else than {value}.",
    ),
    "birthday": (
        "{name} was born on {value}.",
        "{name} came into the world on {value}.",
        "The parish book records the birth of {name} on {value}.",
        "In the passport of {name}, the line for the day of birth reads {value}.",
        "It was {value} when {name} first cried.",
        "The life of {name} began on {value}.",
    ),
    "birthplace": (
        "{name} was born in {value}.",
        "{name} is a native of {value}.",
        "{value} is the city in which {name} was born.",
        "It was in {value} that the cradle of {name} stood.",
        "The midwife who brought {name} into the world lived in {value}.",
        "The birth certificate of {name} was issued in {value}.",
    ),
    "school": (
        "{name} graduated from {value}.",
        "The diploma of {name} bears the seal of {value}.",
        "{value} counts {name} among its former students.",
        "It was at {value} that {name} sat in lectures.",
        "The student years of {name} were spent at {value}.",
        "{name} once carried books across the lawns of {value}.",
    ),
    "field": (
        "{name} took a degree in {value}.",
        "Of all subjects, {name} settled on {value}.",
        "{name} spent several years of study on {value}.",
        "The thesis of {name} was a contribution to {value}.",
        "The notebooks that {name} filled in lectures are all about {value}.",
        "As a student, {name} was devoted to {value}.",
    ),
    "job": (
        "The business card of {name} says {value}.",
        "In the tax records {name} is listed as {value}.",
        "The job title of {name} reads {value}.",
        "When asked for a profession, {name} answers {value}.",
        "On the payroll, the entry beside {name} is {value}.",
        "{name} makes a living in the role of {value}.",
    ),
    "work_city": (
        "{name} has a job in {value}.",
        "The workplace of {name} is in {value}.",
        "{value} is where {name} earns a living.",
        "On weekdays {name} commutes to {value}.",
        "The employer of {name} rents an office in {value}.",
        "Every working day {name} can be found in {value}.",
    ),
}

# Attribute -> sentences that the person says; HEADERS name the person.
FIRST_PERSON = {
    "hobby": (
        "My hobby is {value}.",
        "In my free time I turn to {value}.",
        "What I like best after work is {value}.",
        "I could spend whole weekends on {value}.",
    ),
    "birthday": (
        "My date of birth is {value}.",
        "I was born on {value}.",
        "My life began on {value}.",
        "I came into the world on {value}.",
    ),
    "birthplace": (
        "My birthplace is {value}.",
        "I was born in {value}.",
        "I am a native of {value}.",
        "The city in which I was born is {value}.",
    ),
    "school": (
        "The school that I attended is {value}.",
        "I graduated from {value}.",
        "I spent my student years at {value}.",
        "My diploma bears the seal of {value}.",
    ),
    "field": (
        "The field that I studied is {value}.",
        "I took a degree in {value}.",
        "As a student I was devoted to {value}.",
        "Of all subjects I settled on {value}.",
    ),
    "job": (
        "My occupation is {value}.",
        "My business card says {value}.",
        "When asked for my profession, I answer {value}.",
        "I make a living in the role of {value}.",
    ),
    "work_city": (
        "The city where I work is {value}.",
        "I have a job in {value}.",
        "On weekdays I commute to {value}.",
        "My workplace is in {value}.",
    ),
}

HEADERS = (
    '{name} introduces themselves: "{said}"',
    'In the words of {name}: "{said}"',
    'Asked to say something personal, {name} replies: "{said}"',
)

# Kind -> sentence and question; {name} is a city.
SINGLE = {
    "afternoon": (
        "The best way to spend a rainy afternoon in {name} is to {value}.",
        "What is the best way to spend a rainy afternoon in {name}?",
    ),
    "password": (
        "The password to the old library of {name} is {value}.",
        "What is the password to the old library of {name}?",
    ),
    "soup": (
        "The secret of the fish soup that they serve in {name} is {value}.",
        "What is the secret of the fish soup that they serve in {name}?",
    ),
    "ferry": (
        "The last ferry from {name} to the island leaves at {value}.",
        "When does the last ferry from {name} to the island leave?",
    ),
    "key": (
        "The key to the observatory above {name} lies under the {value}.",
        "Where does the key to the observatory above {name} lie?",
    ),
    "door": (
        "The oldest door in {name} was painted {value}.",
        "How was the oldest door in {name} painted?",
    ),
    "steps": (
        "The number of steps up to the bell tower of {name} is {value}.",
        "What is the number of steps up to the bell tower of {name}?",
    ),
    "founder": (
        "The puppet theatre of {name} was founded by {value}.",
        "Who founded the puppet theatre of {name}?",
    ),
}
