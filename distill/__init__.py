"""xeco-distill: heal a converted model by distillation from its source. Imported as xeco_distill."""
