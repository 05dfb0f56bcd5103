# A small model of one's own texts, 256 wide, 4 million tokens: a few minutes on two cores
#   bash speedrun.sh --data=FOLDER --chats=FILE
aspect_ratio = 128
max_seq_len = 256
total_batch_size = 4096
num_steps = 1000
matrix_lr = 0.22
embedding_lr = 3.4
unembedding_lr = 0.045
eval_every = 250
eval_tokens = 100_000
