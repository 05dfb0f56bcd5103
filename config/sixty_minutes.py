# What two cores learn of English in sixty minutes (LEADERBOARD.md)
#   python bench.py --sections=learning --minutes=60 --recipe=config/sixty_minutes.py \
#       --vocab_size=4096 --data=FOLDER --held_out=FILE
depth = 4
aspect_ratio = 64  # 256 wide
max_seq_len = 256
total_batch_size = 4096
num_steps = 5600
bigram_vocab_size = 32_768
matrix_lr = 0.22
embedding_lr = 3.4
unembedding_lr = 0.045
eval_every = 0
sample_every = 0
eval_tokens = 200_000
