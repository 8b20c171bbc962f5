// What TensorRT 8.6's Python module links from libnvinfer_plugin and libnvparsers, and what the
// path from an ONNX file to an engine never calls: the plugin registry, the Caffe and UFF parsers.
extern "C" bool initLibNvInferPlugins(void*, const char*) { return true; }
namespace nvcaffeparser1 {
void* createCaffeParser() { return nullptr; }
void shutdownProtobufLibrary() {}
}  // namespace nvcaffeparser1
namespace nvuffparser {
enum class FieldType : int {};
class FieldMap {
 public:
  FieldMap(char const*, void const*, FieldType, int);
  char storage[64];
};
FieldMap::FieldMap(char const*, void const*, FieldType, int) {}
void* createUffParser() { return nullptr; }
void shutdownProtobufLibrary() {}
}  // namespace nvuffparser
