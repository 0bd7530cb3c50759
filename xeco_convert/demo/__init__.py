"""A tiny language, and a tiny pretrained GQA model of it, so that xeco_convert can be tried without a download."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
