// SPDX-License-Identifier: Apache-2.0
// Prepared calls in vsa._C: one crossing from Python for all launches between two dependencies.
#include "bind/program.h"

#include "bind/fields.h"

namespace vsa::bind {
namespace {

class Program {
 public:
  explicit Program(std::vector<Step> steps) : steps_(std::move(steps)) {}

  void launch(const Slots& slots, int device, uintptr_t stream) const {
    for (const Step& step : steps_)
      raise_if(
          step.runs.launch(step.prepared.get(), &slots, device, reinterpret_cast<void*>(stream)));
  }
  void emulate(const Slots& slots, int blocks, unsigned seed) const {
    for (const Step& step : steps_)
      raise_if(step.runs.emulate(step.prepared.get(), &slots, blocks, seed));
  }

 private:
  std::vector<Step> steps_;
};

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Step>(m, "Step", "A prepared call, to be run in a Program.");
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<Program>(m, "Program", "Prepared calls that run one after the other.")
      .def(py::init<std::vector<Step>>(), py::arg("steps"))
      .def(
          "launch",
          [](const Program& program, std::vector<uintptr_t> addresses, int device,
             uintptr_t stream) { program.launch({std::move(addresses)}, device, stream); },
          py::arg("addresses"), py::arg("device"), py::arg("stream"), release,
          "Launches on a CUDA device, in one of its streams. The tensors must outlive the work.")
      .def(
          "emulate",
          [](const Program& program, std::vector<uintptr_t> addresses, int blocks, unsigned seed) {
            program.emulate({std::move(addresses)}, blocks, seed);
          },
          py::arg("addresses"), py::arg("blocks"), py::arg("seed"), release,
          "Runs the kernels' source on the CPU: so many blocks, in the schedule of this seed.");
}

}  // namespace vsa::bind
