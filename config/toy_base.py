# Pretraining on the toy world: 3 million parameters, 2.5 million tokens
#   python base_train.py config/toy_base.py
data = "toy"
depth = 2
aspect_ratio = 128
max_seq_len = 256
total_batch_size = 4096
num_steps = 600
matrix_lr = 0.22
embedding_lr = 3.4
unembedding_lr = 0.045
eval_every = 300
eval_tokens = 100_000
