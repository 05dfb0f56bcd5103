# The toy world's tokenizer: python tok_train.py config/toy_tok.py
data = "toy"
vocab_size = 2048
