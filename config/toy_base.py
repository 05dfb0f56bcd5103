# Pretraining on the toy world: 3 million parameters, 3 million tokens
#   python base_train.py config/toy_base.py
data = "toy"
depth = 2
aspect_ratio = 128
max_seq_len = 256
total_batch_size = 4096
num_steps = 800
matrix_lr = 0.22
embedding_lr = 3.4
unembedding_lr = 0.045
eval_every = 200
eval_tokens = 200_000
