"""The LongAlign recipe for stock Hugging Face models.

Three rooms, the paper's three contributions: ``data`` (text to tokens), ``train`` (tokens to model),
``evaluate`` (model to scores). Beside them: ``models`` (the offline default model), ``llm`` (one chat client),
``plots`` (every figure) and ``course`` (profiles and the notebook runner). Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
