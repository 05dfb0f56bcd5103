# Answers, from one's own conversations: bash speedrun.sh --data=FOLDER --chats=FILE
max_steps = 150
matrix_lr = 0.08
embedding_lr = 0.6
unembedding_lr = 0.016
lr_fraction = 0.3
eval_every = 0
eval_tokens = 100_000
