"""Initialisations, one module or package each: how the factors of every layer are made."""

from xeco_convert.initialisation import INITIALISATIONS, ConvertedLayer, Initialisation, LayerMaker, Progress

__all__ = ["INITIALISATIONS", "ConvertedLayer", "Initialisation", "LayerMaker", "Progress"]
