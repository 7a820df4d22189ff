// A page that is opened as a file may not start a Worker, which the search runs in. Run the Worker's script in a frame
// instead. (The name tells mkdocs-material's plugin "offline" that it need not load its own from the network.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script src="${script}"></script>`;
      this.inside = new Promise((resolve) => {
        frame.onload = () => resolve(frame.contentWindow);
      });
      this.inside.then((inside) => {
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      });
      document.documentElement.append(frame);
    }

    postMessage(data) {
      this.inside.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
