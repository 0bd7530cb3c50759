"""The losses of distillation: one file for each, (student, teacher, mask) -> summed loss; the trainer divides once."""

from ..losses.chunked import LossSums, Term, chunked_loss
from ..losses.cross_entropy import CrossEntropy, cross_entropy
from ..losses.forward_kl import ForwardKL, forward_kl
from ..losses.forward_kl_top_k import ForwardKLTopK, forward_kl_top_k
from ..losses.jsd import JSD, jsd
from ..losses.prediction import Prediction, TopKPrediction, VocabularyHead
from ..losses.reverse_kl import ReverseKL, reverse_kl

__all__ = [
    "JSD",
    "CrossEntropy",
    "ForwardKL",
    "ForwardKLTopK",
    "LossSums",
    "Prediction",
    "ReverseKL",
    "Term",
    "TopKPrediction",
    "VocabularyHead",
    "chunked_loss",
    "cross_entropy",
    "forward_kl",
    "forward_kl_top_k",
    "jsd",
    "reverse_kl",
]
