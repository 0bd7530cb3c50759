"""The stages of healing. Each takes a checkpoint folder and leaves another, with every weight in float32."""
