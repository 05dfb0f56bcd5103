# Reinforcement learning on the toy world's word problems: python chat_rl.py config/toy_rl.py
data = "toy"
num_steps = 20
max_new_tokens = 64
matrix_lr = 0.08
embedding_lr = 0.6
unembedding_lr = 0.016
lr_fraction = 0.01
device_batch_size = 32
rollout_rows = 256
eval_every = 0
