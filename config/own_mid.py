# The form of conversations, from one's own: bash speedrun.sh --data=FOLDER --chats=FILE
max_steps = 300
matrix_lr = 0.08
embedding_lr = 0.6
unembedding_lr = 0.016
eval_every = 0
eval_tokens = 100_000
