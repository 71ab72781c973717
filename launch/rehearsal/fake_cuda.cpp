// A CUDA device that torch's C++ believes in, so that autograd runs on fake `cuda` tensors.
//
// A build of torch for CPUs has no device guard and no hooks for CUDA. A build for CUDA has both,
// and they fail where there is no GPU; these take their place. Nothing is ever computed or
// allocated on the device: its tensors are fake.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

thread_local c10::DeviceIndex current_index = 0;

c10::DeviceIndex index_of(c10::Device device) {
  return device.has_index() ? device.index() : 0;
}

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return c10::DeviceType::CUDA;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  c10::Device getDevice() const override {
    return {c10::DeviceType::CUDA, current_index};
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    current_index = index_of(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    current_index = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_index = index_of(device);
  }

  // One stream for everything, on which everything is done already.
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(
        c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, index_of(device)));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return getStream(stream.device());
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

struct FakeHooks final : at::CUDAHooksInterface {
  explicit FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex current_device() const override {
    return current_index;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_index;
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    current_index = index;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    c10::DeviceIndex before = current_index;
    current_index = index;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetCPUAllocator();
  }
};

// Preferred to the hooks of a build for CUDA, which are registered after these.
const bool hooks_are_registered = [] {
  at::CUDAHooksRegistry()->Register(
      "CUDAHooks",
      [](at::CUDAHooksArgs arguments) -> std::unique_ptr<at::CUDAHooksInterface> {
        return std::make_unique<FakeHooks>(arguments);
      },
      c10::REGISTRY_PREFERRED);
  return true;
}();

}  // namespace

// Called when torch is imported, and the guard of a build for CUDA is in place.
extern "C" void install_fake_guard() {
  static FakeGuard guard;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
}
