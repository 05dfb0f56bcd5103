# What two cores that know AVX2 alone learn of English in five minutes (LEADERBOARD.md)
#   python bench.py --sections=learning --minutes=5 --recipe=config/five_minutes_avx2.py \
#       --vocab_size=4096 --data=FOLDER --held_out=FILE
depth = 2
max_seq_len = 256
total_batch_size = 4096
num_steps = 800
bigram_vocab_size = 32_768
matrix_lr = 0.22
embedding_lr = 3.4
unembedding_lr = 0.045
warmdown_ratio = 0.8  # 0.005 bits per byte less than with 0.6 (LOG.md)
eval_every = 0
sample_every = 0
eval_tokens = 200_000
