"""CuPy as far as the engine knows it, without a GPU: arrays have addresses but no memory, and what is launched is noted.

For tests of what the host does: which kernels it loads, what it launches with which arguments. Nothing is computed."""
import ctypes, itertools, sys, threading, time
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace as NS
from unittest.mock import patch
import numpy as np


class Array:
    "Shape, dtype, strides and address. NumPy works them out on a view of memory that nobody touches."
    def __init__(self, view, ptr): self.view_, self.ptr_ = view, ptr
    def __getattr__(self, name):
        if name in ('shape', 'dtype', 'strides', 'ndim', 'size', 'nbytes', 'itemsize', 'flags'): return getattr(self.view_, name)
        raise AttributeError(name)
    def __len__(self): return len(self.view_)
    @property
    def data(self): return NS(ptr=self.ptr_)
    def like(self, view): return Array(view, self.ptr_ + view.__array_interface__['data'][0] - self.view_.__array_interface__['data'][0])
    def __getitem__(self, i): return self.like(self.view_[i])
    def view(self, dtype): return self.like(self.view_.view(dtype))
    def reshape(self, *shape): return self.like(self.view_.reshape(*shape))
    def set(self, a, stream=None): assert a.nbytes == self.nbytes, (a.shape, self.shape)
    def get(self, stream=None): return np.ones(self.shape, self.dtype)


def array(shape, dtype, memory):
    return Array(np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, tuple(np.cumprod([np.dtype(dtype).itemsize, *shape[:0:-1]])[::-1])), memory.ptr)


class Stream:
    number = itertools.count(1)
    def __init__(self, non_blocking=False): self.ptr = next(Stream.number)
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def begin_capture(self): pass
    def end_capture(self): return NS(upload=lambda stream: None, launch=lambda stream: None)
    def synchronize(self): pass


class Event:
    "Half a millisecond lies between any two"
    done, ptr = True, 0
    def __init__(self, disable_timing=False): pass
    def record(self, stream): pass
    def synchronize(self): pass


class Device:
    compute_capability = '90'
    def __init__(self, i=0): pass
    attributes = dict(MultiProcessorCount=132)
    def use(self): pass
    def synchronize(self): pass


@contextmanager
def played(monkeypatch, sm='90', free=100 << 30):
    "Yields what happens: `launches` (stream, kernel, grid, struct of arguments) and their `configs` (threads, bytes of dynamic shared memory, attributes), files whose kernels were `asked` for, and addresses that are `alive` in VRAM or `pinned`"
    from cuda.bindings import driver as cu
    from orcd.kernels import nvrtc
    from orcd.engine import cuda_engine, loader, lower
    launches, configs, asked, alive, pinned, names, parameters, at = [], [], set(), {}, {}, {}, {}, itertools.count(1 << 44, 1 << 38)
    def malloc(n):
        if sum(alive.values()) + n > free: raise Error(2)
        alive[p := next(at)] = n
        return p
    class Error(Exception):
        def __init__(self, status): super().__init__(f'error {status}'); self.status = status
    entered = {threading.get_ident()}
    def pin(n, flags=0):
        assert threading.get_ident() in entered, 'a thread without a context'
        b = ctypes.create_string_buffer(n); pinned[ctypes.addressof(b)] = b; return ctypes.addressof(b)
    def lock(p, n, flags):
        assert threading.get_ident() in entered and p % 4096 == 0
        pinned[p] = n
    nothing = lambda *a: None
    runtime = NS(hostAlloc=pin, freeHost=lambda p: pinned.pop(p), hostRegister=lock, hostUnregister=lambda p: pinned.pop(p), malloc=malloc, free=lambda p: p and alive.pop(p), memcpyHostToDevice=1, memcpyDeviceToHost=2, memcpyDeviceToDevice=3, memcpyAsync=nothing,
        memsetAsync=nothing, memGetInfo=lambda: (free - sum(alive.values()), 141 << 30), getDevice=lambda: 0, getDeviceCount=lambda: 1, setDevice=nothing,
        deviceGetAttribute=lambda *a: nvrtc.CARDS[sm].shared, cudaDevAttrMaxSharedMemoryPerBlockOptin=97, driverGetVersion=lambda: 13000, CUDARuntimeError=Error, deviceSynchronize=nothing, runtimeGetVersion=lambda: 13000,
        memoryTypeDevice=2, pointerGetAttributes=lambda p: NS(type=2, hostPointer=0), getDeviceProperties=lambda i: dict(major=int(sm[:-1]), minor=int(sm[-1]), name=b'a played GPU'))
    class Module:
        def __init__(self, *file): self.file = file
        def get_function(self, name):
            asked.add(self.file)
            names[len(names) + 1] = name
            return NS(ptr=len(names))
    driver = NS(funcSetAttribute=nothing, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, CUDADriverError=type('CUDADriverError', (Error,), {}))
    cuda = ModuleType('cupy.cuda')
    vars(cuda).update(runtime=runtime, driver=driver, Stream=Stream, Event=Event, Device=type('D', (Device,), dict(compute_capability=sm)),
        UnownedMemory=lambda ptr, n, owner, device: ptr, MemoryPointer=lambda memory, offset: NS(ptr=memory + offset), get_current_stream=lambda: NS(ptr=0), get_elapsed_time=lambda a, b: .5)
    cupy = ModuleType('cupy')
    new = lambda n, dtype: array((n,), dtype, NS(ptr=next(at)))
    vars(cupy).update(cuda=cuda, ndarray=array, ones=new, empty=new, float32=np.float32)
    def launch(config, f, arguments):
        "`arguments`: where the driver finds a pointer to each parameter: to the struct, or to each number of it"
        known = parameters[int(f)]
        starts = [*map(int, known.starts), known.size]
        pointers = (ctypes.c_uint64*(len(starts) - 1)).from_address(arguments)
        struct = b''.join(ctypes.string_at(p, end - start) for p, start, end in zip(pointers, starts, starts[1:]))
        configs.append((config.blockDimX, config.sharedMemBytes, config.numAttrs))
        launches.append((int(config.hStream), names[int(f)], (config.gridDimX, config.gridDimY), struct))
        return 0,
    def driver_call(name, *types):
        "What a loader queues, done at once; nothing is copied"
        def wait(stream, at, value, equal):
            while ctypes.c_uint32.from_address(at).value != value: time.sleep(1e-5)
        call = lambda stream, f, at: ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(f)(at)
        return dict(cuStreamWaitValue32_v2=wait, cuLaunchHostFunc=call).get(name, nothing)
    class Kernel(nvrtc.Kernel):
        def __call__(self, grid, block, args, starts, *a, **kw):
            parameters[int(self.handle)] = NS(starts=starts, size=len(args))
            return super().__call__(grid, block, args, starts, *a, **kw)
    class Program(lower.Program):
        def __init__(self, launches, *a):
            super().__init__(launches, *a)
            parameters.update((int(handle), NS(starts=l.args.starts, size=l.args.code.size)) for (_, handle, _), l in zip(self.calls, launches))
    def module(name, device, defines=()):
        assert threading.get_ident() in entered, 'a thread without a context'
        return nvrtc._modules.setdefault((name, device, defines), Module(name, defines))
    for where, what, value in ((nvrtc, '_module', module), (nvrtc, '_modules', {}), (nvrtc, 'Kernel', Kernel), (nvrtc, 'launch_all', lambda calls: [launch(*a) for a in calls]), (lower, 'Program', Program), (cuda_engine, 'Program', Program), (loader, 'driver_call', driver_call), (cu, 'cuCtxGetCurrent', lambda: (0, None)), (cu, 'cuFuncGetAttribute', lambda attribute, f: (0, 0)), (cu, 'cuCtxSetCurrent', lambda context: (entered.add(threading.get_ident()), (0,))[1])): monkeypatch.setattr(where, what, value)
    for f in (nvrtc._kernel, nvrtc._config, nvrtc._card): f.cache_clear()
    with patch.dict(sys.modules, {'cupy': cupy, 'cupy.cuda': cuda}): yield NS(launches=launches, configs=configs, asked=asked, alive=alive, pinned=pinned)
    for f in (nvrtc._kernel, nvrtc._config, nvrtc._card): f.cache_clear()
