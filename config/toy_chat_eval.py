# The toy world's own tasks: python chat_eval.py config/toy_chat_eval.py --source=rl
data = "toy"
max_new_tokens = 96
