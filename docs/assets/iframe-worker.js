/* Browsers start no worker for a page that lies on the disk, so the site's search would not answer there. This runs the
   worker's script in a hidden frame instead. Its name is the one that the theme asks for, and would else fetch a copy of. */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true, srcdoc: "<!doctype html><body>" });
      this.ready = new Promise((done) => {
        this.frame.addEventListener("load", () => this.start(new URL(url, location), done), { once: true });
      });
      document.documentElement.append(this.frame);
    }

    start(url, done) {
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inner.importScripts = async (...urls) => { for (const one of urls) await this.load(one); };
      this.load(url).then(() => done(inner));
    }

    load(url) {
      return new Promise((done, failed) => {
        const script = this.frame.contentDocument.createElement("script");
        Object.assign(script, { src: url, onload: done, onerror: failed });
        this.frame.contentDocument.body.append(script);
      });
    }

    postMessage(data) {
      this.ready.then((inner) => inner.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() { this.frame.remove(); }
  };
  window.Worker = window.IFrameWorker;
}
