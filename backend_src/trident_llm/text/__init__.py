"""Between text and token ids: tokenizer, chat template, incremental detokenizer, stop strings.

It knows neither the server nor the engine, and imports neither torch nor transformers.
"""

from .chat_template import ChatTemplate, parse_messages
from .detokenizer import Detokenizer
from .stop_strings import StopAutomaton, StopMatcher
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopAutomaton", "StopMatcher", "Tokenizer", "parse_messages"]
