"""
Many who ask, one who computes: the models of a run behind chat_web.py. Any thread may ask(); the
main thread alone work()s, with a Batch of answers for each model in use, in which answers come and
go at any token.
"""
import queue
import secrets
import threading
import time
import traceback

import common
import engine
import execution
import models
import pipeline
import talk
from completions import Refused, check

class Job:
    """A request on its way, and its answer."""
    def __init__(self, request, answer):
        self.request = request
        self.answer = answer             # an engine.Answer
        self.name = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.given_up = False            # set where nobody waits for it any more
        self.news = queue.SimpleQueue()  # None when it begins, token ids, "stop", "length", Refused

    def wait(self, client_left):
        """Waits for news -> (tokens that have come, "stop" or "length" if that was all, else "").
        Refused where it cannot be answered. client_left() -> whether nobody is there any more:
        a ConnectionResetError."""
        tokens = []
        while True:
            try:
                item = self.news.get(timeout=0 if tokens else 0.5)
            except queue.Empty:
                if tokens:
                    return tokens, ""
                if client_left():
                    raise ConnectionResetError from None
                continue
            if isinstance(item, Refused):
                raise item
            if item is None:
                return tokens, ""
            if isinstance(item, str):
                return tokens, item
            tokens.append(item)

class Service:
    def __init__(self, data, tag, source, found, compute, weights, rows, max_waiting):
        """source: the stage of which the model is loaded at once, found: its (folder, step); the
        others are when they are asked for. rows: answers of each model at once. max_waiting:
        requests that may wait."""
        self.data, self.tag, self.compute, self.weights = data, tag, compute, weights
        self.rows, self.max_waiting = rows, max_waiting
        self.batches = {}       # stage -> its engine.Batch
        self.jobs = {}          # engine.Answer that grows -> its Job
        self.waiting = []       # jobs
        self.taken = []         # those that begin with the next step
        self.changed = threading.Condition()  # guards waiting and ending
        self.ending = False
        self.tokenizer = None   # of the first model; prompts are judged by it and its context
        self.batch_of(source, found)

    def stages(self):
        """The finished models of the run, base first, those finished meanwhile too."""
        return [model for stage in pipeline.STAGES for model in models.trained(self.data, stage)
                if model.tag == self.tag and model.finished]

    def ask(self, request, most):
        """A completions.Request; most: tokens where it does not say how many -> its Job, which
        waits for its turn. Refused where it cannot be answered."""
        stages = [model.stage for model in self.stages()]
        check(request.model in stages, f"there is no model {request.model[:100]!r}, but "
              f"{', '.join(stages)}", status=404, param="model", code="model_not_found")
        read = request.messages[-1:] if request.model == "base" else request.messages
        texts = [part["text"] for message in read if message["role"] == "assistant"
                 for part in message["content"]]
        texts += [message["content"] for message in read if message["role"] != "assistant"]
        size = sum(map(len, texts))
        # known before seconds are spent on encoding it
        check(size <= self.context * self.tokenizer.longest, f"the messages are {size:,} characters"
              f", more than the model's context of {self.context:,} tokens can hold",
              param="messages", code="context_length_exceeded")
        try:
            prompt = self.prompt_of(request)
        except ValueError as e:
            raise Refused(str(e), param="messages") from None
        room = self.context - len(prompt)
        least = 1 if request.most else talk.room_for_answer(self.context, most)
        check(room >= least, f"the messages are {len(prompt):,} tokens, and the model's context is "
              f"{self.context:,} with the answer", param="messages", code="context_length_exceeded")
        most = min(request.most or most, room)
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2 ** 63
        job = Job(request, engine.Answer(prompt, most, request.temperature, request.top_k,
                                         common.rng(seed, 0).random(most), execution.calculate))
        with self.changed:
            check(not self.ending, "the server is ending", status=503)
            waiting = sum(not job.given_up for job in self.waiting)
            check(waiting < self.max_waiting + self.free(request.model), "too many requests are "
                  "waiting: try again later", status=429, code="queue_full")
            self.waiting.append(job)
            self.changed.notify()
        return job

    def prompt_of(self, request):
        """-> token ids. ValueError where its messages do not take turns."""
        if request.model != "base":
            return self.tokenizer.render_for_completion({"messages": request.messages})
        # it knows no turns: it goes on with what was said last
        return [self.tokenizer.bos, *self.tokenizer.encode(request.messages[-1]["content"])]

    def free(self, stage):
        """How many more answers of a stage's model may grow."""
        return self.batches[stage].free() if stage in self.batches else self.rows

    def end(self):
        """Tells all who wait that nothing comes any more."""
        with self.changed:
            self.ending = True
        for job in [*self.jobs.values(), *self.taken, *self.waiting]:
            job.news.put(Refused("the server is ending", status=503))

    # from here on the main thread alone

    def work(self):
        """Answers, for ever."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.jobs)
                self.taken = self.take()
            for stage in {*self.batches, *(job.request.model for job in self.taken)}:
                new = [job for job in self.taken if job.request.model == stage]
                try:
                    self.step(stage, new)
                except common.Failure as e:
                    self.give_up(stage, new, Refused(str(e), status=500))
                except Exception as e:  # noqa: BLE001  (whatever it is, the others are served)
                    traceback.print_exc()
                    self.give_up(stage, new, Refused(f"{type(e).__name__}: what the server has "
                                                     "printed says more", status=500))

    def batch_of(self, stage, found=None):
        """A stage's model is loaded when it is first asked for. Failure where that cannot be."""
        if stage not in self.batches:
            folder, step = found or talk.find(stage, self.data, self.tag)
            tokenizer = models.load_tokenizer_of(folder, step, self.data)
            model = models.load_to_use(folder, step, self.compute.device, self.compute.dtype)
            context = model.config.sequence_len
            if self.tokenizer is None:
                self.tokenizer, self.context = tokenizer, context
            same = self.context == context and self.tokenizer.fingerprint == tokenizer.fingerprint
            common.check(same, f"the {stage} model has another context or tokenizer than the first "
                         "that was loaded: start the server anew")
            packed = engine.Packed(model, self.rows, self.weights)
            self.batches[stage] = engine.Batch(model, tokenizer, self.rows, context, packed)
            talk.say(f"{talk.description(stage, self.data, self.tag, step)}; {self.compute}")
        return self.batches[stage]

    def take(self):
        """-> the jobs that have waited longest, as far as there is a place for each; a few at a
        time, since all others wait until their prompts have been read"""
        waiting = [job for job in self.waiting if not job.given_up]
        taken = []
        for stage in {job.request.model for job in waiting}:
            of_stage = [job for job in waiting if job.request.model == stage]
            taken += of_stage[:min(self.free(stage), 4)]
        self.waiting = [job for job in waiting if job not in taken]
        return taken

    def step(self, stage, new):
        """A token more for each answer of a stage, and the first for each of the new jobs."""
        batch = self.batch_of(stage)
        for job in new:
            self.jobs[job.answer] = job
            job.news.put(None)
        left = [answer for answer in batch.answers if self.jobs[answer].given_up]
        batch.remove(left)
        for answer in left:
            del self.jobs[answer]
        if new or batch.answers:
            for answer, token in batch.step([job.answer for job in new]):
                self.jobs[answer].news.put(token)
        for answer in [answer for answer in self.jobs if answer.ended]:
            self.jobs.pop(answer).news.put(answer.ended)

    def give_up(self, stage, new, error):
        """Nothing of a stage can go on: who waits for it is told why; the next who asks has the
        model loaded again."""
        self.batches.pop(stage, None)
        for job in {*self.jobs.values(), *new}:
            if job.request.model == stage:
                self.jobs.pop(job.answer, None)
                job.news.put(error)
