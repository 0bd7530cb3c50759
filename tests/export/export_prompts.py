"""What trained models are asked to go on with, by every engine."""

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "Tom and his dog went to the park to play with a big red ball.",
    "The old man looked at the sea and",
    "One day, a small bird fell from the tree. It was",
    '"Can I have a cookie?" asked Ben. His mom',
)
