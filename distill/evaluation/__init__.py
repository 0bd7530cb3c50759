"""How good a healed model is: on text, in finding what stands far back, and on lm-eval's tasks."""
