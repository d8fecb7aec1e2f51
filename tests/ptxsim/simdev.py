# SPDX-License-Identifier: Apache-2.0
"""simdev - "device" tensors for libraries that take CUDA memory, backed by the ptxsim stand-in libcudart.

    import simdev
    x = simdev.to_device(torch_or_numpy_array)     # copies to the simulated device
    y = simdev.empty((4, 8), "bfloat16")           # poisoned with 0xFF bytes, as cudaMalloc is
    lib.op(x, y)                                   # x.__dlpack__() says kDLCUDA; .data_ptr(), __cuda_array_interface__
    simdev.synchronize(); y.numpy() / y.torch()    # copies back

Run Python with LD_LIBRARY_PATH naming ptxsim/build, so that this module and the library under test load
the same libcudart.so.13. With NVIDIA's instead, the tensors are on a real device.
"""

import ctypes
import math
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
try:
    rt = ctypes.CDLL("libcudart.so.13", mode=ctypes.RTLD_GLOBAL)  # as the library under test does; may be NVIDIA's
except OSError:
    rt = ctypes.CDLL(os.path.join(_here, "build", "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
simulated = hasattr(rt, "ptxsim_lock")
rt.cudaGetErrorString.restype = ctypes.c_char_p
_vp, _sz = ctypes.c_void_p, ctypes.c_size_t
rt.cudaMalloc.argtypes = [ctypes.POINTER(_vp), _sz]
rt.cudaFree.argtypes = [_vp]
rt.cudaMemcpy.argtypes = [_vp, _vp, _sz, ctypes.c_int]
rt.cudaMemset.argtypes = [_vp, ctypes.c_int, _sz]

# name -> (DLPack code, bits); codes: 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
DTYPES = {
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bfloat16": (4, 16),
    "bool": (6, 8),
    "float8_e4m3fn": (10, 8),
    "float8_e5m2": (12, 8),
}


class CudaError(RuntimeError):
    pass


def check(err):
    if err:
        raise CudaError(f"{err}: {rt.cudaGetErrorString(err).decode()}")


def synchronize():
    check(rt.cudaDeviceSynchronize())


def set_device(d):
    check(rt.cudaSetDevice(d))


def current_device():
    d = ctypes.c_int()
    check(rt.cudaGetDevice(ctypes.byref(d)))
    return d.value


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", _vp),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [("dl_tensor", _DLTensor), ("manager_ctx", _vp), ("deleter", _DELETER)]


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)]


class _DLManagedTensorVersioned(ctypes.Structure):
    pass


_DELETER_V = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensorVersioned))
_DLManagedTensorVersioned._fields_ = [
    ("version", _Version),
    ("manager_ctx", _vp),
    ("deleter", _DELETER_V),
    ("flags", ctypes.c_uint64),
    ("dl_tensor", _DLTensor),
]
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [_vp, ctypes.c_char_p, _vp]
_live = {}  # address of a managed tensor -> objects it needs


@_DELETER
def _release(p):
    _live.pop(ctypes.addressof(p.contents), None)


@_DELETER_V
def _release_v(p):
    _live.pop(ctypes.addressof(p.contents), None)


class Storage:
    def __init__(self, nbytes, device=None):
        if device is not None:
            set_device(device)
        self.device, self.nbytes, p = current_device(), nbytes, _vp()
        check(rt.cudaMalloc(ctypes.byref(p), max(nbytes, 1)))
        self.ptr = p.value
        if not simulated:
            check(rt.cudaMemset(self.ptr, 0xFF, nbytes))

    def __del__(self):
        try:
            rt.cudaFree(self.ptr)
        except Exception:
            pass


class Tensor:
    """A contiguous or strided device tensor; strides are in elements."""

    def __init__(self, shape, dtype, storage=None, strides=None, offset=0, device=None):
        self.shape, self.dtype = tuple(int(s) for s in shape), str(dtype).replace("torch.", "")
        self.itemsize = DTYPES[self.dtype][1] // 8
        n = 1
        st = []
        for s in reversed(self.shape):
            st.append(n)
            n *= s
        self.strides = tuple(strides) if strides is not None else tuple(reversed(st))
        self.size, self.offset = n, offset
        self.storage = storage or Storage(n * self.itemsize, device)

    @property
    def device(self):
        return self.storage.device

    @property
    def nbytes(self):
        return self.size * self.itemsize

    def data_ptr(self):
        return self.storage.ptr + self.offset * self.itemsize

    def view(self, shape, strides=None, offset=0):
        return Tensor(shape, self.dtype, self.storage, strides, self.offset + offset)

    def reshape(self, *shape):
        """Contiguous tensors only, without -1."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.shape} cannot be {tuple(shape)}")
        return self.view(shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        """x[i], an entry of the first dimension, or x[i:j], some of them."""
        if isinstance(key, slice):
            first, last, step = key.indices(self.shape[0])
            rows = max(0, last - first)
            if step != 1:
                raise ValueError("expected step 1")
            return self.view((rows, *self.shape[1:]), self.strides, first * self.strides[0])
        if not 0 <= key < self.shape[0]:
            raise IndexError(key)
        return self.view(self.shape[1:], self.strides[1:], key * self.strides[0])

    def __array_namespace__(self, api_version=None):
        """This module: libraries that make tensors through the array API find empty_like here."""
        return sys.modules[__name__]

    def __dlpack_device__(self):
        return (2, self.device)

    def __dlpack__(self, stream=None, max_version=None, dl_device=None, copy=None):
        n = len(self.shape)
        shape = (ctypes.c_int64 * max(n, 1))(*self.shape)
        strides = (ctypes.c_int64 * max(n, 1))(*self.strides)
        code, bits = DTYPES[self.dtype]
        versioned = max_version is not None and max_version[0] >= 1
        m = _DLManagedTensorVersioned() if versioned else _DLManagedTensor()
        m.dl_tensor = _DLTensor(
            self.data_ptr(), _DLDevice(2, self.device), n, _DLDataType(code, bits, 1), shape, strides, 0
        )
        m.deleter = _release_v if versioned else _release
        if versioned:
            m.version = _Version(1, 0)
        _live[ctypes.addressof(m)] = (m, shape, strides, self)
        return _new(ctypes.addressof(m), b"dltensor_versioned" if versioned else b"dltensor", None)

    @property
    def __cuda_array_interface__(self):
        kind = {0: "i", 1: "u", 2: "f", 4: "V", 6: "b"}.get(DTYPES[self.dtype][0], "V")
        return {
            "shape": self.shape,
            "typestr": f"<{kind}{self.itemsize}",
            "data": (self.data_ptr(), False),
            "version": 3,
            "strides": tuple(s * self.itemsize for s in self.strides),
        }

    def raw(self):
        """The bytes from the first element on (contiguous tensors)."""
        synchronize()
        buf = ctypes.create_string_buffer(max(self.nbytes, 1))
        check(rt.cudaMemcpy(ctypes.addressof(buf), self.data_ptr(), self.nbytes, 2))
        return buf.raw[: self.nbytes]

    def numpy(self):
        import numpy as np

        d = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}.get(self.dtype, self.dtype)
        return np.frombuffer(self.raw(), dtype=d).reshape(self.shape).copy()

    def torch(self):
        import torch

        return (
            torch.frombuffer(bytearray(self.raw()), dtype=getattr(torch, self.dtype)).reshape(self.shape)
            if self.size
            else torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        )

    def copy_(self, src):
        """Copies a CPU numpy array or torch tensor of the same size in."""
        if hasattr(src, "data_ptr"):
            src = src.detach().contiguous()
            ptr, n = src.data_ptr(), src.numel() * src.element_size()
        else:
            import numpy as np

            src = np.ascontiguousarray(src)
            ptr, n = src.ctypes.data, src.nbytes
        if n != self.nbytes:
            raise ValueError(f"{n} bytes into a tensor of {self.nbytes}")
        check(rt.cudaMemcpy(self.data_ptr(), ptr, n, 1))
        return self

    def fill_bytes(self, v):
        check(rt.cudaMemset(self.data_ptr(), v, self.nbytes))
        return self


def empty(shape, dtype, device=None):
    return Tensor(shape, dtype, device=device)


def empty_like(x):
    return Tensor(x.shape, x.dtype, device=x.device)


def to_device(a, device=None):
    return Tensor(a.shape, a.dtype, device=device).copy_(a)
