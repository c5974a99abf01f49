"""Text to tokens: documents, long instructions built from them, and the store of encoded chats.

documents   -> the nine source kinds and local readers        verifiable  -> questions with answers known beforehand
instructions-> Self-Instruct against a chat endpoint          gates       -> why a question or an answer is rejected
tokens      -> chats to token ids and labels, TokenStore      jsonl       -> files in and out
"""
