"""Sentences for the synthetic voices, written for this purpose, and the voices that say them.

They mix open and closed vowels, lips that meet (m, b, p), lips that round (o, u, w) and long
hisses, in several languages, so that the sounds that move a mouth all occur often.
"""

from __future__ import annotations

# voice of espeak-ng -> what it says
SENTENCES: dict[str, tuple[str, ...]] = {
    "en-us": (
        "The blue boat moved slowly past the wooden bridge.",
        "My mother bought a bag of apples and a pound of plums.",
        "How many people came over to see the new museum?",
        "Please leave the keys beneath the green teapot.",
        "A warm wind blew over the open meadow all afternoon.",
        "Bob and Emma often walk home together in the rain.",
        "We heard a humming sound from somewhere above the roof.",
        "She sees three geese asleep beside the stream.",
        "You should put your shoes in the room at the top.",
        "I am almost sure that the bakery opens at half past five.",
        "Father parked the car far from the harbour.",
        "Would you move the yellow umbrella, please?",
    ),
    "en-gb": (
        "Nobody knows who wrote the poem on the wall.",
        "The choir began to sing before the lights went out.",
        "Put the pepper by the bowl of mushroom soup.",
        "It took us two whole days to row across the bay.",
        "Every evening the old man feeds the pigeons in the square.",
        "What a marvellous idea, but where would we keep the piano?",
        "They painted the front of the house a pale shade of green.",
        "Oh no, I believe the last bus has already gone.",
        "A small brown bear climbed up the apple tree.",
        "Choose a number from one to forty-two.",
    ),
    "en-scotland": (
        "The ferry leaves for the island at a quarter to nine.",
        "Have you ever been out on the moor in a storm?",
        "My brother mends old violins above the butcher's shop.",
        "Come over on Monday, and bring the map with you.",
    ),
    "de": (
        "Am Abend saßen wir oben auf der Mauer und sahen den Booten zu.",
        "Meine Oma backt immer im Winter Brot mit Mohn.",
        "Wo um alles in der Welt ist mein blauer Mantel?",
        "Sieben Bienen fliegen um die grüne Wiese.",
        "Papa nahm das Paket und machte die Tür wieder zu.",
        "Morgen früh möchte ich über die Brücke laufen.",
    ),
    "fr-fr": (
        "Le petit bateau bleu passe sous le pont de bois.",
        "Ma mère a mis des pommes et du beurre dans le panier.",
        "Où avez-vous vu la lune hier au soir ?",
        "Nous avons beaucoup aimé la musique de ce film.",
        "Il fait si beau que tout le monde marche au bord de l'eau.",
        "Un ami m'a prêté une bonne voiture pour le voyage.",
    ),
    "es": (
        "La abuela puso un mantel blanco sobre la mesa.",
        "Mañana por la mañana vamos a bajar al mar.",
        "El abogado perdió su sombrero en el tren de las ocho.",
        "Me gusta mucho beber agua muy fría en verano.",
        "Un lobo bobo baja al pueblo y come pan.",
        "Vimos una luna enorme encima del puente.",
    ),
    "it": (
        "Il mio bambino mangia una mela sopra il muro.",
        "Domani andiamo tutti insieme a vedere il mare.",
        "La bella piazza era piena di musica e di luce.",
        "Ho aperto piano la porta e ho visto un gatto bianco.",
        "Quanti libri hai messo in quella borsa?",
    ),
    "pt-br": (
        "A moça abriu a janela e ouviu uma música bonita.",
        "Meu pai pôs o bolo de milho em cima da mesa.",
        "Amanhã vamos embora bem cedo, antes da chuva.",
        "O povo todo subiu o morro para ver a lua.",
    ),
    "pl": (
        "Mama upiekła bułki z makiem i powidłami.",
        "Po obiedzie poszliśmy nad wodę oglądać łabędzie.",
        "Kup proszę mleko, masło i pół bochenka chleba.",
        "W sobotę bawimy się u babci w ogrodzie.",
    ),
    "sv": (
        "Min mormor bor i ett blått hus vid bron.",
        "Vi åt bullar och såg på båtarna i hamnen.",
        "Kan du öppna fönstret en liten stund?",
        "På sommaren badar vi i sjön varje morgon.",
    ),
}

# Voice variants that come with espeak-ng: men and women of several timbres.
VARIANTS = ("m3", "f2", "m7", "f4", "m1", "f3", "m5", "f1", "klatt2", "m2")
# Words a minute.
SPEEDS = (135, 160, 180, 150, 170, 125)
PITCHES = (50, 45, 60, 38, 55, 65, 42)
