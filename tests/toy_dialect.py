"`fake_worker.py` that speaks one more language: JSON lines, or one JSON body, of several prompts"
import json, sys
from functools import partial

import orcd.serve.worker as w
from fake_worker import load
from orcd.serve.jobs import WholeFrames
from orcd.serve.protocol import ApiError, Request, parse_json, to_json
from orcd.serve.routes import Dialect, safely


class Lines(WholeFrames):
    "A line an event; what a token says is kept back while it begins with a dot"
    every_token = True

    def __init__(self):
        super().__init__()
        self.texts, self.seen = [''], []

    def token(self, token):
        self.texts[-1] += token.text
        self.seen.append(token.id)
        return b'' if token.text.startswith('.') else (to_json(token.text) + '\n').encode()

    def event(self, event):
        self.last = event
        if event.type == 'next': self.texts.append('')
        return (event.type + '\n').encode()

    def answer(self):
        if self.last.type == 'error': return (e := ApiError(self.last.fields['code'], self.last.fields['message'])).status, shape(e, '')
        return 200, dict(texts=self.texts, tokens=self.seen)


def shape(error, cid): return dict(oops=error.message)


def register(app, worker):
    def read(body):
        d = parse_json(body)
        if refusal := worker.jobs.refusal(None): raise refusal
        texts = [worker.encoded(Request(d.get('id', 'toy'), p, dict(max_tokens=9999))) for p in d['prompts']]
        return texts, d.get('stream', False)

    async def answer(http):
        worker.must_be_open()
        texts, stream = await worker.work(read, await worker.body(http))
        return worker.run(http, texts, Lines(), whole=not stream)

    @app.post('/toy/answer')
    async def toy(request: w.HTTPRequest): return await safely(answer(request), request, shape)


TOY = Dialect(register, shape, ('/toy/',))

if __name__ == '__main__':
    w.make_app = partial(w.make_app, dialects=[TOY])
    w.RequestMiddleware = partial(w.RequestMiddleware, dialects=[TOY])
    settings = w.Settings(**dict(model='fake.gguf', port=0) | json.loads(sys.argv[1] if len(sys.argv) > 1 else '{}'))
    sys.exit(w.serve(settings, load))
