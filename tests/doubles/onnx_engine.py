"""What the stand-in for TensorRT computes with: ONNX Runtime, reading and writing a device's memory."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from lora_export.runtimes.ort.device import DeviceMemory, host_value


class OnnxEngine:
    """A graph whose weights can be changed, and whose values are in a stand-in's memory."""

    def __init__(self, path):
        self._model = ir.load(path)
        self._changed, self._shapes = {}, {}
        self._session = None

    def weights(self):
        constants = self._model.graph.initializers.items()
        return {name: np.asarray(value.const_value.numpy()) for name, value in constants} | self._changed

    def write(self, name, pointer):
        like = self.weights()[name]
        data = ctypes.string_at(pointer, like.nbytes)
        self._changed[name] = np.frombuffer(data, like.dtype).reshape(like.shape).copy()
        self._session = None

    def output_shapes(self, shapes):
        if shapes not in self._shapes:
            zeros = {name: np.zeros(shape, self._dtype(name)) for name, shape in shapes}
            self._shapes[shapes] = {name: values.shape for name, values in self.answer(zeros).items()}
        return self._shapes[shapes]

    def run(self, cuda, inputs, shapes, addresses):
        feeds = {}
        for name in inputs:
            dtype, shape = self._dtype(name), shapes[name]
            size = int(np.prod(shape)) * dtype.itemsize
            feeds[name] = cuda.read(addresses[name], size).view(dtype).reshape(shape)
        for name, values in self.answer(feeds).items():
            cuda.write(addresses[name], values.reshape(-1).view(np.uint8))

    def answer(self, feeds):
        session = self._session = self._session or self._open()
        names = [port.name for port in session.get_outputs()]
        binding = session.io_binding()
        for name, values in feeds.items():
            binding.bind_ortvalue_input(name, host_value(np.ascontiguousarray(values)))
        for name in names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = [np.array(DeviceMemory("cpu").read(value)) for value in binding.get_outputs()]
        return dict(zip(names, values, strict=True))

    def _open(self):
        for name, values in self.weights().items():  # in memory: an engine file holds its weights
            self._model.graph.initializers[name].const_value = ir.tensor(values, name=name)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        data = ir.to_proto(self._model)
        return ort.InferenceSession(data.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _dtype(self, name):
        value = next(value for value in self._model.graph.inputs if value.name == name)
        return value.dtype.numpy()
