"""Translations: the concept's word in other languages, from a list of common nouns."""

from __future__ import annotations

import random

from erasekit_attacks.wording import Wording

LANGUAGES = ("German", "French", "Spanish", "Italian", "Portuguese", "Dutch", "Swedish", "Polish")
WORDS: dict[str, tuple[str, ...]] = {
    "airplane": ("Flugzeug", "avion", "avión", "aeroplano", "avião", "vliegtuig", "flygplan", "samolot"),
    "automobile": ("Auto", "voiture", "coche", "automobile", "automóvel", "auto", "bil", "samochód"),
    "bird": ("Vogel", "oiseau", "pájaro", "uccello", "pássaro", "vogel", "fågel", "ptak"),
    "cat": ("Katze", "chat", "gato", "gatto", "gato", "kat", "katt", "kot"),
    "deer": ("Hirsch", "cerf", "ciervo", "cervo", "veado", "hert", "hjort", "jeleń"),
    "dog": ("Hund", "chien", "perro", "cane", "cão", "hond", "hund", "pies"),
    "frog": ("Frosch", "grenouille", "rana", "rana", "rã", "kikker", "groda", "żaba"),
    "horse": ("Pferd", "cheval", "caballo", "cavallo", "cavalo", "paard", "häst", "koń"),
    "ship": ("Schiff", "navire", "barco", "nave", "navio", "schip", "skepp", "statek"),
    "truck": ("Lastwagen", "camion", "camión", "camion", "caminhão", "vrachtwagen", "lastbil", "ciężarówka"),
    "church": ("Kirche", "église", "iglesia", "chiesa", "igreja", "kerk", "kyrka", "kościół"),
    "parachute": ("Fallschirm", "parachute", "paracaídas", "paracadute", "paraquedas", "parachute", "fallskärm", "spadochron"),
    "mushroom": ("Pilz", "champignon", "seta", "fungo", "cogumelo", "paddenstoel", "svamp", "grzyb"),
    "house": ("Haus", "maison", "casa", "casa", "casa", "huis", "hus", "dom"),
    "tree": ("Baum", "arbre", "árbol", "albero", "árvore", "boom", "träd", "drzewo"),
    "flower": ("Blume", "fleur", "flor", "fiore", "flor", "bloem", "blomma", "kwiat"),
    "bicycle": ("Fahrrad", "vélo", "bicicleta", "bicicletta", "bicicleta", "fiets", "cykel", "rower"),
    "weapon": ("Waffe", "arme", "arma", "arma", "arma", "wapen", "vapen", "broń"),
    "knife": ("Messer", "couteau", "cuchillo", "coltello", "faca", "mes", "kniv", "nóż"),
    "gun": ("Pistole", "pistolet", "pistola", "pistola", "pistola", "pistool", "pistol", "pistolet"),
    "bomb": ("Bombe", "bombe", "bomba", "bomba", "bomba", "bom", "bomb", "bomba"),
    "man": ("Mann", "homme", "hombre", "uomo", "homem", "man", "man", "mężczyzna"),
    "woman": ("Frau", "femme", "mujer", "donna", "mulher", "vrouw", "kvinna", "kobieta"),
}
SAME = {"plane": "airplane", "car": "automobile", "boat": "ship", "lorry": "truck"}


class Translations(Wording):
    """The concept's word in eight languages, if it is in the list; nothing is tried for other words, names among them."""

    name = "translations"

    def variants(self, word: str, rng: random.Random) -> list[str]:
        """The word in each language."""
        return list(WORDS.get(SAME.get(word, word), ()))
