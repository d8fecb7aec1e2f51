# SPDX-License-Identifier: Apache-2.0
"""Tensors of libraries that do not exist, made of DLPack structs by hand: well-behaved, old, odd and hostile ones."""

import ctypes

import numpy as np

CPU, CUDA = (1, 0), (2, 0)
READ_ONLY, IS_COPIED = 1, 2
CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    ]


DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_forever = []  # what capsules point to, and has no deleter
_live = {}  # (producer, managed tensor) of the exports that are out, by address


def capsule(address, name):
    """A PyCapsule without a destructor."""
    return _new_capsule(address, name, None)


@DELETER
def _delete(address):
    _live.pop(address)[0].deleted += 1  # and with the managed tensor goes its memory


class Crafted:
    """A CPU tensor over a NumPy array whose every DLPack field can be chosen. Counts what becomes of its exports.

    Attributes:
        exported: how often it was exported.
        deleted: how often a deleter was called.
    """

    def __init__(self, array, *, legacy=False, old_signature=False, deleter=True, **fields):
        self.array = array
        self.legacy = legacy
        self.old_signature = old_signature
        self.deleter = deleter
        self.fields = fields
        self.exported = self.deleted = 0
        self.lent = None

    def managed(self):
        """A new managed tensor."""
        array, fields = self.array, self.fields
        managed = Managed() if self.legacy else ManagedVersioned()
        kind = array.dtype.name.rstrip("0123456789")
        shape = fields.get("shape", array.shape)
        strides = fields.get("strides", [step // array.itemsize for step in array.strides])
        tensor = managed.dl_tensor
        tensor.data = fields.get("data", array.ctypes.data)
        tensor.device_type, tensor.device_id = fields.get("device", CPU)
        tensor.ndim = fields.get("ndim", len(shape))
        tensor.code = fields.get("code", CODES[kind])
        tensor.bits = fields.get("bits", 8 * array.itemsize)
        tensor.lanes = fields.get("lanes", 1)
        tensor.shape = (ctypes.c_int64 * len(shape))(*shape)
        if strides is not None:
            tensor.strides = (ctypes.c_int64 * len(strides))(*strides)
        tensor.byte_offset = fields.get("byte_offset", 0)
        managed.deleter = ctypes.cast(_delete, ctypes.c_void_p) if self.deleter else None
        if not self.legacy:
            managed.major, managed.minor = fields.get("version", (1, 3))
            managed.flags = fields.get("flags", 0)
        return managed

    def export(self):
        """The address of a new managed tensor, for a consumer to own."""
        managed = self.managed()
        self.exported += 1
        if self.deleter:
            _live[ctypes.addressof(managed)] = (self, managed)
        else:
            _forever.append(managed)
        return ctypes.addressof(managed)

    def __dlpack__(self, **kwargs):
        if self.old_signature and kwargs:
            raise TypeError(f"__dlpack__() got an unexpected keyword argument {next(iter(kwargs))!r}")
        return capsule(self.export(), b"dltensor" if self.legacy else b"dltensor_versioned")

    def __dlpack_device__(self):
        return self.fields.get("device", CPU)


class Tabled(Crafted):
    """The same through a C exchange table only: __dlpack__ must not be called. Make a subclass by `with_table`."""

    def __dlpack__(self, **kwargs):
        raise AssertionError("the exchange table is there to be used")


TO_MANAGED = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
TO_TENSOR = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))


class Table(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev_api", ctypes.c_void_p),
        ("allocator", ctypes.c_void_p),
        ("to_managed", ctypes.c_void_p),
        ("from_managed", ctypes.c_void_p),
        ("to_tensor", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


@TO_MANAGED
def _to_managed(producer, out):
    producer.ways.append("managed")
    out[0] = producer.export()
    return 0


@TO_TENSOR
def _to_tensor(producer, out):
    producer.ways.append("tensor")
    producer.lent = producer.managed()  # stays the producer's
    out[0] = producer.lent.dl_tensor
    return 0


def with_table(*versions, borrowed=True):
    """A Tabled type whose table has these major versions, newest first; older ones hang behind it."""
    older = None
    for major in reversed(versions):
        table = Table(major, 0)
        if major == 1:
            table.to_managed = ctypes.cast(_to_managed, ctypes.c_void_p)
            table.to_tensor = ctypes.cast(_to_tensor, ctypes.c_void_p) if borrowed else None
        table.prev_api = older
        _forever.append(table)
        older = ctypes.addressof(table)
    return type("Tabled", (Tabled,), {"__dlpack_c_exchange_api__": capsule(older, b"dlpack_exchange_api"), "ways": []})


class Foreign:
    """What most libraries are: a __dlpack__ of its own over somebody else's memory, and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def words_of(tensor):
    """The memory of a 16-bit tensor as a uint16 array, shared: bfloat16 too, which NumPy does not have."""

    class Words:
        def __dlpack__(self, **kwargs):
            exported = tensor.__dlpack__(max_version=(1, 0))
            address = _capsule_pointer(exported, b"dltensor_versioned")
            fields = ManagedVersioned.from_address(address).dl_tensor
            fields.code, fields.bits = CODES["uint"], 16
            return exported

        def __dlpack_device__(self):
            return CPU

    return np.from_dlpack(Words())


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
