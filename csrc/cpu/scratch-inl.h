// Scratch memory of a thread's work. It is in the namespace of the instruction set like all that is compiled for one:
// its templates must not be shared with code for another.

namespace xeco::XECO_ISA {

// Scratch of one task: 64-byte aligned pieces of one block, which the thread keeps for its next task.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return;
    std::free(block_);
    capacity_ = (bytes + 63) / 64 * 64;
    block_ = static_cast<char*>(std::aligned_alloc(64, capacity_));
    if (block_ == nullptr) {
      capacity_ = 0;
      throw std::bad_alloc();
    }
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(block_ + used_);
    used_ += piece_bytes<T>(count);
    return piece;
  }

  template <class T>
  static size_t piece_bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* block_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
};

}  // namespace xeco::XECO_ISA
