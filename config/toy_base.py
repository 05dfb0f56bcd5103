# Pretraining on the toy world: 5 million parameters, 8 million tokens
#   python base_train.py config/toy_base.py
data = "toy"
depth = 4
max_seq_len = 256
total_batch_size = 8192
num_steps = 1000
matrix_lr = 0.12
embedding_lr = 1.8
unembedding_lr = 0.024
eval_every = 250
eval_tokens = 200_000
