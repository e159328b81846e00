"A real worker on a GPU whose context is lost when a prompt asks for it: `python tests/fatal_worker.py '{...settings...}'`"
import json, sys, time
import numpy as np
from orcd.serve.worker import Settings, load_model, serve

SOURCE = 'extern "C" __global__ void wild(int* p) { *p = 1; }'


def load(settings, progress):
    "The model; the prompt `wild write` makes a kernel write to address 0, half a second after the prefill"
    from cupy.cuda.function import Module
    from orcd.kernels.nvrtc import compile_text, device_arch
    model, module = load_model(settings, progress), Module()
    module.load(compile_text('wild', SOURCE, device_arch()).cubin)
    generate, begin, fatal = model.generate, model.engine._begin, model.encode('wild write')
    def wild(params):
        begin(params)
        time.sleep(.5)
        module.get_function('wild')((1,), (1,), (np.uintp(0),), stream=model.engine.stream)
    def armed(prompt, **kw):
        if prompt == fatal: model.engine._begin = wild
        return generate(prompt, **kw)
    model.generate = armed
    return model


if __name__ == '__main__': sys.exit(serve(Settings(**dict(port=0) | json.loads(sys.argv[1])), load))
