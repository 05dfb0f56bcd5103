# The tokenizer of a small model of one's own: bash speedrun.sh --data=FOLDER --chats=FILE
vocab_size = 4096
