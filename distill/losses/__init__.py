"""The losses of distillation: one file for each, (student, teacher, mask) -> summed loss; the trainer divides once."""

from xeco_distill.losses.chunked import LossSums, Term, chunked_loss
from xeco_distill.losses.cross_entropy import CrossEntropy, cross_entropy
from xeco_distill.losses.forward_kl import ForwardKL, forward_kl
from xeco_distill.losses.forward_kl_top_k import ForwardKLTopK, forward_kl_top_k
from xeco_distill.losses.jsd import JSD, jsd
from xeco_distill.losses.prediction import Prediction, TopKPrediction, VocabularyHead
from xeco_distill.losses.reverse_kl import ReverseKL, reverse_kl

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
