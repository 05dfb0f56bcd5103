# Pretraining on the toy world: 3 million parameters, 4 million tokens
#   python base_train.py config/toy_base.py
data = "toy"
depth = 2
aspect_ratio = 128
max_seq_len = 256
total_batch_size = 4096
num_steps = 1000
matrix_lr = 0.12
embedding_lr = 1.8
unembedding_lr = 0.024
eval_every = 250
eval_tokens = 200_000
