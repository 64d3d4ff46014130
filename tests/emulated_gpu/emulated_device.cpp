// What libtorch asks of a CUDA device before it dispatches, differentiates and casts: answers of a device that is none.
// Loaded before libtorch_cpu with RTLD_GLOBAL, so that the functions of at::accelerator below are found first.
// EMULATED_GPUS says how many devices there are; one by default.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;
thread_local c10::DeviceIndex current = 0;
c10::Device device() { return c10::Device(CUDA, current); }
c10::Stream stream(c10::Device of = device()) { return c10::Stream(c10::Stream::DEFAULT, of); }
c10::DeviceIndex count() {
  const char* given = std::getenv("EMULATED_GPUS");
  return given ? std::atoi(given) : 1;
}
c10::DeviceIndex exchange(c10::DeviceIndex index) { return std::exchange(current, index); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device to) const override { return c10::Device(CUDA, exchange(to.index())); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device to) const override { current = to.index(); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { current = to.index(); }
  c10::Stream getStream(c10::Device of) const override { return stream(of); }
  c10::Stream getDefaultStream(c10::Device of) const override { return stream(of); }
  c10::Stream getNewStream(c10::Device of, int) const override { return stream(of); }
  c10::Stream exchangeStream(c10::Stream to) const override { return stream(to.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return count(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return count(); }
  c10::DeviceIndex deviceCount() const override { return count(); }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
};
}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)

namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return CUDA; }
c10::Stream getCurrentStream(c10::DeviceIndex index) { return stream(c10::Device(CUDA, index)); }
void setCurrentStream(c10::Stream) {}
c10::DeviceIndex deviceCount() { return count(); }
c10::DeviceIndex getDeviceIndex() { return current; }
c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) { return exchange(index); }
c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) { return exchange(index); }
}  // namespace at::accelerator
