"""What features mean: explanations by a language model or by word statistics, with their scores.

A label is only worth what it predicts. Whoever wrote it, it is scored in the same way: told the
label alone, which of a feature's held-out contexts and of other features' contexts activate it?
"""
